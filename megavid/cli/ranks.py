"""Which ranks a command runs on: those that torchrun or srun started, or as many as ``--ranks`` asks for.

Owns the one rule that the two exclude each other.
"""

from megavid.errors import ConfigError
from megavid.parallel.launch import RankEnv


def find_ranks(asked: int) -> tuple[RankEnv, int]:
    """Who this process is, and how many ranks there are or will be.

    Args:
        asked: ``--ranks``; 0 where it was not given.

    Raises:
        ConfigError: ``--ranks`` under torchrun or srun.
    """
    env = RankEnv.detect()
    if env.world_size > 1 and asked:
        raise ConfigError(
            f"--ranks {asked} was given, but {env.world_size} ranks were started by torchrun or srun; leave it out"
        )
    return env, env.world_size if env.world_size > 1 else asked or 1
