"""The schema of the model: tables ``model`` and ``model.moe``.

Owns names, types, defaults and the checks that need one table only. ``megavid.config.schema`` passes both classes on.
Every field's string below it is its ``--help``. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Literal

from megavid.config.checks import at_least, require


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The mixture-of-experts feed-forward of family ``wan_moe``; not read by family ``wan``."""

    num_experts: int = 8
    """Routed experts of one layer."""
    top_k: int = 2
    """Experts that each token goes to (expert choice: on average)."""
    expert_ffn_size: int = 256
    """Hidden width of one routed expert."""
    shared_ffn_size: int = 0
    """Hidden width of the shared expert that every token passes; 0 for none."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of routed and shared experts: GELU-tanh (two matrices) or SwiGLU (three)."""
    has_bias: bool = True
    """Give the experts the biases that Wan's feed-forward has."""
    router: Literal["sigmoid", "softmax", "expert_choice"] = "sigmoid"
    """How tokens and experts find each other; see megavid/models/moe/router.py."""
    route_scale: float = 1.0
    """Factor on the gates after they are normalised over the selected experts (sigmoid)."""
    num_groups: int = 1
    """Groups that the experts are cut into for group-limited routing; 1 for no limit."""
    top_groups: int = 1
    """Groups that a token may use."""
    bias_update_rate: float = 1e-3
    """Step of the aux-loss-free balancing bias after each optimizer step (sigmoid); 0 for none."""
    aux_loss_weight: float = 0.0
    """Weight of the load-balancing loss of each clip (softmax; 1e-2 is usual)."""
    z_loss_weight: float = 0.0
    """Weight of the squared log-sum-exp of the router's logits."""
    dense_first: int = 1
    """Layers at the beginning that keep a dense feed-forward."""
    dense_last: int = 1
    """Layers at the end that keep a dense feed-forward."""

    def __post_init__(self) -> None:
        at_least(
            "model.moe",
            1,
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_ffn_size=self.expert_ffn_size,
        )
        at_least(
            "model.moe",
            0,
            shared_ffn_size=self.shared_ffn_size,
            dense_first=self.dense_first,
            dense_last=self.dense_last,
        )
        at_least("model.moe", 1, num_groups=self.num_groups, top_groups=self.top_groups)
        require(
            self.top_k <= self.num_experts,
            f"model.moe.top_k = {self.top_k} must be at most model.moe.num_experts = {self.num_experts}",
        )
        require(
            self.num_experts % self.num_groups == 0,
            f"model.moe.num_groups = {self.num_groups} must divide model.moe.num_experts = {self.num_experts}",
        )
        require(
            self.top_groups <= self.num_groups,
            f"model.moe.top_groups = {self.top_groups} must be at most model.moe.num_groups = {self.num_groups}",
        )
        require(
            self.top_k <= self.top_groups * (self.num_experts // self.num_groups),
            f"model.moe.top_k = {self.top_k} must fit in the {self.top_groups} groups of "
            f"{self.num_experts // self.num_groups} experts that model.moe.top_groups allows",
        )
        require(
            self.router != "expert_choice" or self.num_groups == 1,
            "model.moe.num_groups must be 1 with model.moe.router = 'expert_choice'",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The video diffusion transformer."""

    family: Literal["wan", "wan_moe"] = "wan_moe"
    """``wan``: the dense block of Wan 2.1/2.2. ``wan_moe``: the same with experts between its dense first and
    last layers.
    """
    num_layers: int = 4
    """Transformer blocks."""
    hidden_size: int = 128
    """Width of the residual stream (D)."""
    num_heads: int = 4
    """Attention heads (N)."""
    ffn_size: int = 512
    """Hidden width of the dense feed-forward (M)."""
    in_channels: int = 16
    """Latent channels that enter."""
    out_channels: int = 16
    """Latent channels of the predicted velocity."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    text_size: int = 4096
    """Width of the text encoder's features."""
    text_length: int = 512
    """Text tokens of one caption (L); shorter ones end in zeros, which are attended to, as in Wan."""
    frequency_size: int = 256
    """Width of the sinusoidal timestep embedding."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    latent_frame_rate: float = 4.0
    """Latent frames per second at which one frame is one step of the time axis of RoPE (Wan: 16 fps / 4)."""
    absolute_positions: bool = False
    """Add a fixed code of each token's time, row and column to its patch. RoPE tells distances alone, so at high noise,
    where all tokens look alike, nothing says where the edges are. Off in Wan.
    """
    task: Literal["t2v", "i2v", "ti2v"] = "t2v"
    """What the model is given beside the caption. ``t2v``: nothing. ``i2v``: known frames in further input channels:
    noised latents, their mask, their latents (Wan: 16 + 4 + 16). ``ti2v``: known latent frames clean, at timestep 0.
    """
    image_size: int = 0
    """Width of an image encoder's features, which cross-attention attends to beside the text (Wan 2.1 I2V: 1280); 0 for
    no image branch.
    """
    image_length: int = 257
    """Image tokens of one clip: 257 of each of its pictures (image_size > 0)."""
    image_positions: int = 0
    """Learned positions of the image tokens, as many as image_length (first-last-frame models: 514); 0 for none."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Experts."""

    def __post_init__(self) -> None:
        at_least("model", 1, num_layers=self.num_layers, hidden_size=self.hidden_size, num_heads=self.num_heads)
        at_least("model", 1, ffn_size=self.ffn_size, in_channels=self.in_channels, text_length=self.text_length)
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.num_heads = {self.num_heads} must divide model.hidden_size = {self.hidden_size}",
        )
        require(
            (self.hidden_size // self.num_heads) % 2 == 0,
            f"model.hidden_size / model.num_heads = {self.hidden_size // self.num_heads} must be even for RoPE",
        )
        require(min(self.patch_size) >= 1, f"model.patch_size = {self.patch_size} must be at least 1 on each axis")
        require(
            self.frequency_size % 2 == 0,
            f"model.frequency_size = {self.frequency_size} must be even (sines and cosines)",
        )
        self._check_conditioning()
        require(
            self.family == "wan" or self.moe.dense_first + self.moe.dense_last < self.num_layers,
            f"model.moe.dense_first + dense_last = {self.moe.dense_first + self.moe.dense_last} "
            f"leaves no expert layer among model.num_layers = {self.num_layers}; lower them or set "
            "model.family = 'wan'",
        )

    def _check_conditioning(self) -> None:
        at_least("model", 0, image_size=self.image_size)
        at_least("model", 1, image_length=self.image_length)
        require(
            self.task != "i2v" or self.mask_channels >= 1,
            f"model.in_channels = {self.in_channels} must be above twice model.out_channels = {self.out_channels} with "
            "model.task = 'i2v': noised latents, a mask, latents of the known frames (Wan: 36 for 16)",
        )
        require(
            self.task != "ti2v" or self.in_channels == self.out_channels,
            f"model.in_channels = {self.in_channels} must be model.out_channels = {self.out_channels} with "
            "model.task = 'ti2v', whose known frames stand in the latents themselves",
        )
        require(
            self.task != "ti2v" or self.patch_size[0] == 1,
            f"model.patch_size = {self.patch_size} must have 1 latent frame in a token with model.task = 'ti2v', whose "
            "timesteps go by frame",
        )
        require(
            self.image_size == 0 or self.image_positions in (0, self.image_length),
            f"model.image_positions = {self.image_positions} must be 0 or model.image_length = {self.image_length}",
        )

    @property
    def mask_channels(self) -> int:
        """Input channels that say which frames are known (task ``i2v``): frames of video in a latent frame."""
        return self.in_channels - 2 * self.out_channels if self.task == "i2v" else 0

    @property
    def image_tokens(self) -> int:
        """Image tokens that cross-attention attends to for each clip; 0 without an image branch."""
        return self.image_length if self.image_size else 0

    @property
    def prompt_tokens(self) -> int:
        """Keys of cross-attention for each clip: text and image."""
        return self.text_length + self.image_tokens

    @property
    def timesteps_of_clip(self) -> int:
        """Rows of the timestep table for each clip: its noise level, and 0 for what is given clean."""
        return 2 if self.task == "ti2v" else 1

    @property
    def head_size(self) -> int:
        """Width of one head (A)."""
        return self.hidden_size // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent positions of one token."""
        frames, rows, columns = self.patch_size
        return frames * rows * columns

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has experts."""
        return self.family == "wan_moe" and self.moe.dense_first <= layer < self.num_layers - self.moe.dense_last
