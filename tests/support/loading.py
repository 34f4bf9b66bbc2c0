"""The loader of a run as training builds it, from the config alone."""

from megavid.config.schema import RunConfig
from megavid.data.build import build_source, build_text_encoder
from megavid.data.loader import Loader


def loader_of(config: RunConfig, *, dp_rank: int = 0, dp_size: int = 1) -> Loader:
    """A fresh one, for a data-parallel rank."""
    return Loader(config, build_source(config), build_text_encoder(config), dp_rank=dp_rank, dp_size=dp_size)
