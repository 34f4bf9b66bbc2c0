"""The schema of adapters: table ``lora``.

Owns names, types, defaults and the checks that need one table only. ``megavid.config.schema`` passes it on. Every
field's string below it is its ``--help``. Nothing here imports torch.
"""

from dataclasses import dataclass

from megavid.config.checks import at_least, require

TARGETS = ("self_attention", "cross_attention", "ffn")
"""What adapters can stand on: q, k, v and out of either attention (of models with an image branch its k and v too),
and both matrices of a dense feed-forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters: the model of train.init_from stays as it is, W x + (alpha / rank) B A x is learnt."""

    rank: int = 0
    """Rows of A and columns of B; 0 trains the whole model."""
    alpha: float = 0.0
    """What adapters are added with is alpha / rank; 0 for alpha = rank."""
    targets: tuple[str, ...] = TARGETS
    """Which matrices get adapters: of self_attention, of cross_attention, of a dense ffn; all else is frozen, experts
    and routers too. On the command line: '["self_attention", "ffn"]'."""

    def __post_init__(self) -> None:
        at_least("lora", 0, rank=self.rank)
        require(self.alpha >= 0, f"lora.alpha = {self.alpha} must be at least 0")
        unknown = [target for target in self.targets if target not in TARGETS]
        require(
            not unknown and len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            f"lora.targets = {list(self.targets)} must be some of {', '.join(TARGETS)}, each once",
        )

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return (self.alpha or self.rank) / self.rank

    def adapts(self, matrix: str) -> bool:
        """Whether the matrix ``blocks.N.PART.NAME`` in model space gets an adapter."""
        return self.rank > 0 and matrix.split(".")[2] in self.targets


NO_ADAPTERS = LoraConfig()
"""The whole model is trained."""
