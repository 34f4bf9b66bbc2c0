"""Runs that the planner has no answer for: refused in one line rather than answered wrongly.

Owns that list, for every command that plans.
"""

from megavid.config.schema import RunConfig, require


def refuse_unplanned(config: RunConfig, command: str) -> None:
    """Refuse a run of adapters, and ZeRO beyond the sharding that is planned.

    Raises:
        ConfigError: ``lora.rank`` is set, or DeepSpeed shards gradients or weights, or keeps something in host memory.
    """
    require(
        not config.lora.rank,
        f"{command} does not know runs of adapters yet (lora.rank = {config.lora.rank}); leave lora.* out: memory and "
        "time of the whole model are above what adapters take",
    )
    zero = config.deepspeed
    require(
        (zero.zero_stage, zero.offload) == (1, "none"),
        f"{command} knows DeepSpeed's ZeRO-1 only (deepspeed.zero_stage = {zero.zero_stage}, offload = "
        f"'{zero.offload}'); leave deepspeed.* out: memory of ZeRO-1 is above what they take, time and traffic are not",
    )
