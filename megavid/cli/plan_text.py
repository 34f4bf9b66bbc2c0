"""How ``megavid plan`` reads in a terminal: one layout in full, or a search's ranking.

Owns words, order and the command line that trains what was planned; every figure is the answer's.
"""

import shlex
from collections.abc import Sequence

from megavid.cli.tables import (
    WIDTH,
    bar,
    billions,
    duration,
    percent,
    scaled,
    section,
    significant,
    table,
    words,
    wrapped,
)  # fmt: skip
from megavid.config.load import DEGREES, layout_sizes, load_run
from megavid.config.resume import differences
from megavid.plan.answer import Answer
from megavid.plan.flops import PARTS
from megavid.plan.memory import GIB
from megavid.plan.search import Candidate, Found

Words = Sequence[str]
LEAST = 0.002
"""Share below which parts are shown together."""


def plan_text(preset: str, answer: Answer, command: str, *, is_summary: bool = False) -> str:
    """Everything about one layout, or its first lines."""
    lines = [*_title(preset, answer), "", *_summary(answer)]
    if is_summary:
        return "\n".join(lines)
    pp = answer.layout.pp
    fullest = f" of stage {answer.stage + 1} of {pp}, the fullest" if pp > 1 else ""
    busiest = f" of stage {answer.traffic_stage + 1} of {pp}, which sends most," if pp > 1 else ""
    lines += section("Parameters", _parameters(answer))
    lines += section("Work, FLOPs", _flops(answer))
    lines += section(f"Memory of a rank{fullest}", _memory(answer))
    lines += section("Step, seconds of the critical path in the middle of the interval", _step(answer))
    lines += section(f"Traffic that a rank{busiest} sends in a step", _traffic(answer))
    lines += section("Run", _run(answer))
    lines += section("Checkpoints and failures", _goodput(answer))
    lines += section("Command", _command(command))
    return "\n".join(lines)


def search_text(preset: str, overrides: Words, found: Found, *, is_summary: bool = False) -> str:
    """The best layout, after it the runners-up and why each loses."""
    best, counts = found.candidates[0].answer, found.counts
    lines = wrapped(
        "",
        f"{counts['tried']:,} layouts, of which {counts['light']:,} may fit by their bounds. {counts['judged']:,} were "
        f"added up, and {counts['fit']:,} of those fit; the rest are slower than the ranking below by their bounds.",
        label=0,
        indent=0,
    )
    lines += ["", plan_text(preset, best, command_of(preset, overrides, best), is_summary=is_summary)]
    lines += section("Ranking; differences are those in the middle of the intervals", _ranking(found.candidates))
    lines += section("Faster, but too large", _ranking(found.too_large))
    lines += section("Notes", [line for note in found.notes for line in wrapped("-", note, label=2)])
    if is_summary:
        lines += section("Command", _command(command_of(preset, overrides, best)))
    return "\n".join(lines)


def command_of(preset: str, overrides: Words, answer: Answer) -> str:
    """The command that trains this: the keys that differ from the preset, nothing else."""
    keys = _differences(preset, answer)
    ranks = answer.layout.world_size
    # A node of an NVL72 rack has four GPUs, every other one eight.
    gpus = min(4 if answer.hardware.nvlink_domain > 8 else 8, ranks)
    nodes = -(-ranks // gpus)
    start = f"torchrun --nproc-per-node {gpus} -m megavid"
    if nodes > 1:
        start = f"srun --nodes {nodes} --ntasks-per-node {gpus} --gpus-per-node {gpus} megavid"
    name = preset.rpartition("/")[2].removesuffix(".toml")
    words = [f"{start} train {shlex.quote(preset)} --out runs/{shlex.quote(name)}"]
    words += [f"--{key} {shlex.quote(value)}" for key, value in keys.items()]
    return " ".join(words)


def _differences(preset: str, answer: Answer) -> dict[str, str]:
    """Keys of the answer's config whose values are not the preset's, as the command line takes them."""
    ranks = answer.layout.world_size
    plain = load_run(preset, [], world_size=ranks)
    if plain.parallel == answer.config.parallel or ranks not in layout_sizes(preset):
        return {key: _value(new) for key, _, new in differences(plain, answer.config)}
    # Another layout than the preset's for so many ranks: naming a degree is what replaces that one.
    keys = {key: _value(new) for key, _, new in differences(load_run(preset, []), answer.config)}
    return keys if set(DEGREES) & keys.keys() else {DEGREES[0]: _value(answer.config.parallel.tensor), **keys}


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


# Blocks


def _title(preset: str, answer: Answer) -> list[str]:
    tokens = sum(answer.workload.clip_tokens)
    return [
        f"{preset} on {answer.layout.world_size:,} x {answer.hardware.name}, clips of {answer.workload.name} "
        f"({tokens:,} tokens)"
    ]


def _summary(answer: Answer) -> list[str]:
    train, parallel = answer.config.train, answer.config.parallel
    limit, total = answer.hardware.memory_bytes / GIB, answer.memory.total / GIB
    low, high = answer.mfu_interval
    fast, slow = answer.step_interval
    cp = f", context by {parallel.context_strategy}" if parallel.context > 1 else ""
    if answer.fits:
        room = f"{total:.1f} of {limit:.1f} GiB on the fullest rank, {limit - total:.1f} GiB free"
    else:
        keep = limit * answer.headroom
        room = f"NO: {total:.1f} GiB on the fullest rank; the GPU has {limit:.1f}, of which {keep:.1f} are to stay free"
    rows = [
        ("layout", f"{answer.layout.describe()}, recompute {parallel.recompute}{cp}"),
        (
            "batch",
            f"{train.global_batch_size} packs a step: {answer.layout.dp} replicas x {answer.microbatches} microbatches "
            f"x {train.micro_batch_size}; packs of {answer.workload.pack_tokens:,} tokens",
        ),
        ("fits", room),
        ("step", f"{significant(fast)} to {significant(slow)} s, {scaled(answer.tokens_per_s)} tokens/s in the middle"),
        ("MFU", f"{percent(low)} to {percent(high)} of the {answer.peak} (as far off as {answer.evidence})"),
        ("binds", answer.binding.text),
    ]
    lines = [line for name, text in rows for line in wrapped(name, text)]
    for number, advice in enumerate(answer.binding.advice):
        lines += wrapped("" if number else "try", advice)
    for number, note in enumerate(answer.notes):
        lines += wrapped("" if number else "assumes", note)
    return lines


def _parameters(answer: Answer) -> list[str]:
    counts = answer.counts
    rows = [
        ("total", billions(counts.total)),
        ("active for a token", billions(counts.active)),
        ("on the fullest rank", billions(answer.rank_parameters)),
    ]
    return table(rows)


def _flops(answer: Answer) -> list[str]:
    work, clips = answer.work, answer.workload.samples_per_step
    total = work.forward.total
    shown = [part for part in PARTS if work.forward[part] >= LEAST * total]
    rest = [part for part in PARTS if 0 < work.forward[part] < LEAST * total]
    rows = []
    for name, parts in [(words(part), [part]) for part in shown] + ([(_others(rest), rest)] if rest else []):
        forward = sum(work.forward[part] for part in parts) / clips
        again = sum(work.recompute[part] for part in parts) / clips
        share = forward * clips / total
        rows.append((name, scaled(forward), scaled(2 * forward), scaled(again), percent(share), "  " + bar(share)))
    again = work.recompute.total / clips
    rows.append(("one clip", scaled(total / clips), scaled(2 * total / clips), scaled(again), "100%", ""))
    rows.append(("one step", scaled(total), scaled(2 * total), scaled(work.recompute.total), "", ""))
    lines = _flush_last(rows, ("", "forward", "backward", "recompute", "share", ""))
    model = f"{scaled(work.model / clips)}FLOP a clip and {scaled(work.model)}FLOP a step, forward + backward"
    return [*lines, *wrapped("", f"MFU counts {model}; recomputation and padding count in HFU only.", label=0)]


def _memory(answer: Answer) -> list[str]:
    limit = answer.hardware.memory_bytes
    rows = [
        (words(part), f"{size / GIB:.2f}", percent(size / limit), "  " + bar(size / limit))
        for part, size in answer.memory.parts.items()
        if size
    ]
    total = answer.memory.total
    rows.append(("in all", f"{total / GIB:.2f}", percent(total / limit), "  " + bar(min(total / limit, 1.0))))
    lines = _flush_last(rows, ("", "GiB", "of GPU", ""))
    if answer.layout.pp > 1:
        stages = ", ".join(f"{size / GIB:.1f}" for size in answer.stage_bytes)
        lines += wrapped("by stage", stages)
    lines += wrapped("host", f"{answer.host_bytes / GIB:.1f} GiB of host memory on each such rank stage checkpoints")
    return lines


def _step(answer: Answer) -> list[str]:
    total = answer.time.total
    parts = sorted(((part, s) for part, s in answer.time.parts.items() if s > 0), key=lambda item: -item[1])
    rest = [part for part, seconds in parts if seconds < LEAST * total]
    named = [(words(part), seconds) for part, seconds in parts if part not in rest]
    named += [(_others(rest), sum(answer.time.parts[part] for part in rest))] if rest else []
    rows = [(name, f"{seconds:.3f}", percent(seconds / total), "  " + bar(seconds / total)) for name, seconds in named]
    rows.append(("in all", f"{total:.3f}", "100%", ""))
    return _flush_last(rows, ("", "s", "share", ""))


def _traffic(answer: Answer) -> list[str]:
    least = 1e-5 * sum(transfer.bytes for transfer in answer.transfers)
    small = [transfer for transfer in answer.transfers if 0 < transfer.bytes < least]
    rows: list[Words] = [
        (
            transfer.axis,
            words(transfer.operation),
            "NVLink" if transfer.fabric == "nvlink" else transfer.fabric,
            f"{transfer.group_size}",
            f"{transfer.calls:,.0f}",
            scaled(transfer.bytes, "B"),
            "while computing" if transfer.is_overlapped else "exposed",
        )
        for transfer in answer.transfers
        if transfer.bytes and transfer not in small
    ]
    if small:
        calls, sent = sum(transfer.calls for transfer in small), sum(transfer.bytes for transfer in small)
        rows.append((f"{len(small)} others", "", "", "", f"{calls:,.0f}", scaled(sent, "B"), ""))
    return _flush_last(rows, ("axis", "operation", "fabric", "ranks", "calls", "sent", ""), left=3)


def _run(answer: Answer) -> list[str]:
    low, high = answer.mfu_interval
    fast, slow = answer.days(mfu=high), answer.days(mfu=low)
    hours = 24 * answer.layout.world_size
    steps = answer.budget_tokens / (answer.workload.tokens * answer.workload.packs_per_step)
    text = (
        f"{scaled(answer.budget_tokens)} tokens are {steps:,.0f} steps: {significant(fast)} to {significant(slow)} "
        f"days, {scaled(fast * hours)} to {scaled(slow * hours)} GPU-hours, failures included"
    )
    return wrapped("budget", text)


def _goodput(answer: Answer) -> list[str]:
    goodput = answer.goodput
    rows = [
        ("checkpoint", f"{scaled(goodput.checkpoint_bytes)}B, whole after {duration(goodput.write_s)}; the steps wait "
                       f"{duration(goodput.blocked_s)} for the copy to host memory"),
        ("failures", f"one in {duration(goodput.mtbf_s)} is expected; a restart takes {duration(goodput.restart_s)}"),
        ("best", f"save every {goodput.interval_steps:,} steps ({duration(goodput.interval_s)}, Young/Daly): "
                 f"goodput {goodput.fraction:.2%}"),
    ]  # fmt: skip
    if goodput.configured_steps:
        text = f"checkpoint.interval_steps = {goodput.configured_steps}: goodput {goodput.configured_fraction:.2%}"
        rows.append(("as set", text))
    return [line for name, text in rows for line in wrapped(name, text)]


def _command(command: str) -> list[str]:
    """One option a line where it is long, so that it can be pasted."""
    if len(command) + 2 <= WIDTH:
        return ["  " + command]
    head, *options = command.split(" --out ")
    parts = ("--out " + " --out ".join(options)).split(" --")
    lines, line = [], "  " + head
    for part in [parts[0], *(f"--{part}" for part in parts[1:])]:
        if len(line) + len(part) + 3 > WIDTH:
            lines.append(line + " \\")
            line = "      " + part
        else:
            line += " " + part
    return [*lines, line]


def _ranking(candidates: Sequence[Candidate]) -> list[str]:
    lines = []
    for number, candidate in enumerate(candidates, 1):
        answer = candidate.answer
        (low, high), (fast, slow) = answer.mfu_interval, answer.step_interval
        parallel, train = answer.config.parallel, answer.config.train
        extra = f", {parallel.context_strategy}" if parallel.context > 1 else ""
        micro = f", micro {train.micro_batch_size}" if train.micro_batch_size > 1 else ""
        lines.append(
            f"  {number:>2}  {significant(fast):>4} to {significant(slow)} s  MFU {percent(low)} to {percent(high)}  "
            f"{answer.memory.total / GIB:5.1f} GiB  {answer.layout.describe()}, {parallel.recompute}{extra}{micro}"
        )
        lines += wrapped("", candidate.reason, label=4)
    return lines


def _others(parts: Sequence[str]) -> str:
    return words(parts[0]) if len(parts) == 1 else f"{len(parts)} others"


def _flush_last(rows: Sequence[Words], heading: Words, left: int = 1) -> list[str]:
    """A table whose last column stands to the left."""
    width = max((len(row[-1]) for row in rows), default=0)
    return table([(*row[:-1], row[-1].ljust(width)) for row in rows], heading=heading, left=left)
