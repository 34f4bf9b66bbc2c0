"""How ``megavid plan --data`` reads: what the clips of a run take to store, to read, and to encode.

Owns words, order and the JSON's keys; every figure is ``megavid.plan.storage``'s.
"""

import math
from dataclasses import asdict
from typing import Any

from megavid.cli.tables import dollars, percent, scaled, section, significant, table, wrapped
from megavid.plan.answer import Answer
from megavid.plan.storage import BreakEven, DataSet, ReadRate, Store, break_evens, kinds, read_rates


def data_json(data: DataSet, prices: Store, answer: Answer | None) -> dict[str, Any]:
    """The same figures for programs: bytes, dollars, seconds, bytes/s."""
    found: dict[str, Any] = {
        "data": asdict(data),
        "store": asdict(prices),
        "kinds": [asdict(kind) for kind in kinds(data, prices)],
        "encode": [_finite(asdict(row)) for row in break_evens(data, prices)],
    }
    if answer is not None:
        found |= {
            "step_time_s": answer.time.total,
            "step_time_interval_s": list(answer.step_interval),
            "clips_per_step": answer.workload.samples_per_step,
            "read": [asdict(rate) for rate in _rates(data, answer)],
        }
    return found


def data_text(data: DataSet, prices: Store, answer: Answer | None) -> str:
    """Storage, money, the break-even of encoding, and, with a layout, the rates at which the job reads."""
    size = f"{data.frames}x{data.height}x{data.width}"
    kept, read = _times(data.months, "month"), _times(data.epochs, "time")
    lines = [f"{scaled(data.clips)} clips of {size}, stored for {kept}, read {read}"]
    rows = [
        (
            kind.name,
            scaled(kind.clip_bytes, "B"),
            scaled(kind.total_bytes, "B"),
            dollars(kind.storage_month),
            dollars(kind.write_once),
            dollars(kind.read_epoch),
            dollars(kind.egress_epoch),
        )
        for kind in kinds(data, prices)
    ]
    heading = ("", "a clip", "in all", "a month", "write once", "read once", "egress once")
    lines += section("Bytes and money", table(rows, heading=heading))
    lines += wrapped("", "Requests are one a clip; shards that hold many clips need fewer.", label=0)
    lines += wrapped("", f"Prices: {prices.name}, read {prices.read} ({prices.source}).", label=0)
    lines += section("Encode once and keep, or encode in every epoch", _encode(data, prices, answer))
    if answer is not None:
        lines += section(_read_title(answer), _read(_rates(data, answer)))
        lines += wrapped(
            "", "Rates are those of the fastest step. All ranks: each reads for itself, as the loader does. Unique: "
            "every clip once, a cache for the rest.",
            label=0,
        )  # fmt: skip
    else:
        lines += ["", "With --world-size N --gpu GPU: the rates at which the job has to read."]
    return "\n".join(lines)


def _encode(data: DataSet, prices: Store, answer: Answer | None) -> list[str]:
    found = break_evens(data, prices)
    rows = []
    for row in found:
        if not row.encode_gpu_s:
            rows.append((row.name, "?", "?", "?", "?", "pass --encode-gpu-s", ""))
            continue
        rows.append(
            (
                row.name,
                f"{significant(row.encode_gpu_s)} s",
                scaled(row.encode_gpu_hours, "h"),
                dollars(row.encode_cost),
                dollars(row.keep_cost),
                _epochs(row),
                _share(row, data, answer),
            )
        )
    heading = ("", "GPU a clip", "GPU, all", "encode all", "keep", "keep from", "online" if answer else "")
    lines = table(rows, heading=heading)
    sources = dict.fromkeys(row.source for row in found if row.encode_gpu_s)
    lines += wrapped("", "Keeping is cheaper from that many epochs on; the video is stored either way.", label=0)
    if answer is not None:
        lines += wrapped("", "Online: GPU time that encoding in the job adds to each clip's training.", label=0)
    return lines + [line for source in sources for line in wrapped("", f"GPU time: {source}.", label=0)]


def _times(number: float, unit: str) -> str:
    return f"{number:g} {unit}" + ("" if number == 1 else "s")


def _epochs(row: BreakEven) -> str:
    return f"{significant(row.epochs)} epochs" if math.isfinite(row.epochs) else "never"


def _share(row: BreakEven, data: DataSet, answer: Answer | None) -> str:
    """What encoding online adds, on the GPU that its time was measured on, as a share of training one clip."""
    if answer is None:
        return ""
    gpu_s = answer.time.total * answer.layout.world_size / answer.workload.samples_per_step
    return f"+{percent(row.encode_gpu_s / gpu_s)}"


def _rates(data: DataSet, answer: Answer) -> tuple[ReadRate, ...]:
    """Rates for the fastest step of the interval: storage that is sized for the middle may stall a good run."""
    return read_rates(
        data,
        clips_per_step=answer.workload.samples_per_step,
        step_time_s=answer.step_interval[0],
        ranks=answer.layout.world_size,
        replicas=answer.layout.dp,
    )


def _read_title(answer: Answer) -> str:
    fast, slow = answer.step_interval
    return (
        f"Reading {answer.workload.samples_per_step:,} clips so that no step of {significant(fast)} to "
        f"{significant(slow)} s waits ({answer.layout.world_size:,} ranks, {answer.layout.describe()})"
    )


def _read(rates: tuple[ReadRate, ...]) -> list[str]:
    rows = [
        (rate.name, scaled(rate.rank_rate, "B/s"), scaled(rate.job_rate, "B/s"), scaled(rate.unique_rate, "B/s"))
        for rate in rates
    ]
    return table(rows, heading=("", "a rank", "all ranks", "unique"))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null stands for never."""
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in row.items()}
