"""The versions that are meant to go together: one table, for ``megavid doctor`` and for the README.

Owns the rows and whether each was tested; who compares and who warns is the doctor. A cell is a version
prefix, or "own" for whatever the image carries, or "-" for what the row does without.
"""

from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class Versions:
    """One row: what was, or is meant to be, installed together."""

    setting: str
    """Where: a pip environment, or a container image."""
    python: str
    """Python."""
    torch: str
    """torch; a local label such as ``+cpu`` says which build."""
    megatron_core: str
    """megatron-core."""
    transformer_engine: str
    """Transformer Engine."""
    cuda: str
    """CUDA that torch was built with."""
    driver: str
    """Least NVIDIA driver."""
    tested: str
    """``tested`` with what, or ``not yet``."""

    def accepts(self, *, python: str, torch: str, megatron_core: str, transformer_engine: str, cuda: str) -> bool:
        """Whether the installed versions are those of this row; "" stands for what is not there."""
        wanted = (self.python, self.torch, self.megatron_core, self.transformer_engine, self.cuda)
        found = (python, torch, megatron_core, transformer_engine, cuda)
        return all(_fits(want, have) for want, have in zip(wanted, found))


def _fits(want: str, have: str) -> bool:
    if want == "own":
        return have != ""
    if want == "-":
        return have == ""
    # 2.13 takes 2.13.0 and 2.13.0+cpu, and not 2.130.
    return have == want or have.startswith((f"{want}.", f"{want}+"))


VERSIONS = (
    Versions("pip, CPU", "3.11", "2.13.0", "0.16.1", "-", "-", "-", "tested: `make test`"),
    Versions("pip, CPU", "3.11", "2.13.0", "0.19.2", "-", "-", "-", "tested: `make test-mcore-latest`"),
    Versions("pip, CPU", "3.12", "2.13.0", "0.19", "-", "-", "-", "not yet"),
    Versions("pip, GPU", "3.11", "2.13.0", "0.16.1", "-", "own", "own", "not yet"),
    Versions("pip, GPU", "3.12", "2.13.0", "0.19", "-", "own", "own", "not yet"),
    Versions("image pytorch:25.10-py3", "3.12", "own", "0.19", "own", "own", "own", "not yet"),
)
"""Every row, those that are tested first."""

HEADINGS = ("where", "Python", "torch", "megatron-core", "TE", "CUDA", "driver", "")
"""Headings of ``as_markdown``."""


def as_markdown() -> str:
    """The table as the README shows it ("own" reads "its own")."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS)]
    rows += [tuple("its own" if cell == "own" else cell for cell in astuple(row)) for row in VERSIONS]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
