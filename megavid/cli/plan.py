"""``megavid plan``: what a run will need and take, before it starts, on a laptop.

Owns the arguments, and which answer is printed in which form. Nothing on the way imports torch: the answer comes in
under two seconds.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from megavid.cli.arguments import decimal_number, take_flag, take_option, whole_number
from megavid.config.load import load_run, preset_names
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.plan.goodput import Faults
from megavid.plan.hardware import Hardware, hardware, table
from megavid.plan.job import HEADROOM, Job
from megavid.plan.storage import DataSet
from megavid.plan.unplanned import refuse_unplanned

HELP = "what a run needs and takes (memory, traffic, time, money), and the best layout; no GPU, no torch"

USAGE = """\
usage: megavid plan PRESET_OR_TOML --world-size N --gpu GPU [--search] [--json] [options] [--section.key VALUE ...]
       megavid plan PRESET_OR_TOML --data CLIPS [--world-size N --gpu GPU] [--json] [options]
       megavid plan --hindcast [--json]

  PRESET_OR_TOML        a preset, or a .toml file; presets: {presets}
  --world-size N        GPUs
  --gpu GPU             {gpus}
  --search              try all legal layouts of the N GPUs, print the best and why the next ones lose; keys that
                        are given (--parallel.tensor 4) keep their values
  --json                the same figures for programs
  --summary             the first lines alone; with --search the ranking too
  --hindcast            predict published runs and print the errors, row by row
  --data CLIPS          storage, read rates and money for so many clips

  the clip
  --frames N --height N --width N      (default 81 x 480 x 832), one in each pack
  --tokens BUDGET                      video tokens to train on (default train.steps steps)

  assumptions that you can replace
  --calibration FILE                   what `megavid profile --probe FILE` measured; without --gpu its machine too
  --headroom SHARE                     of GPU memory that stays free (default {headroom})
  --mtbf-gpu-hours H                   hours between failures of one GPU (default {mtbf:.0f}: Llama 3, published)
  --restart-minutes M                  from a failure to the next step (default {restart:.0f}, an assumption)
  --storage-gb-s R                     write rate of the whole job (default {write:.2f} a GPU: Llama 3's file system)

  with --search
  --runners-up N                       layouts printed after the best (default {runners_up})

  with --data
  --video-mb MB                        one clip as compressed video (default {video_mb:.0f})
  --epochs E --months M                how often it is read, how long it is kept (default 1, 1)
  --store NAME                         {stores} (default s3)
  --encode-gpu-s S --gpu-hour PRICE    GPU seconds to encode one clip; dollars of a GPU hour

Config keys as in `megavid train --help`: --parallel.tensor 8, --train.global_batch_size 512, ...
"""

RUNNERS_UP = 5


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip in pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    preset: str
    overrides: tuple[str, ...]
    world_size: int
    gpu: str
    clip: Clip
    is_json: bool
    is_search: bool
    is_summary: bool
    runners_up: int
    tokens: float
    headroom: float
    calibration: str
    faults: Faults
    clips: int
    data: dict[str, float]
    store: str


def main(argv: Sequence[str]) -> int:
    """Plan; see ``USAGE``. Returns the exit status, raises ``ConfigError`` for a request that has no answer."""
    if not argv or {"-h", "--help"} & set(argv):
        print(_usage())
        return 0
    rest = list(argv)
    if take_flag(rest, "--hindcast"):
        return _hindcast(rest)
    request = parse(rest)
    config = load_run(request.preset, request.overrides, world_size=request.world_size)
    refuse_unplanned(config, "megavid plan")
    if request.clips:
        return _data(request, config)
    gpu = _machine(request)
    report = _search(request, config, gpu) if request.is_search else _plan(request, config, gpu)
    _print(report[0] if request.is_json else report[1])
    return 0


def parse(argv: list[str]) -> Request:
    """Take this command's own arguments; what is left are config keys.

    Raises:
        ConfigError: a missing or repeated argument, or one that is no number.
    """
    rest = list(argv)
    take = {name: take_option(rest, f"--{name}") for name in _OPTIONS}
    flags = {name: take_flag(rest, f"--{name}") for name in ("json", "search", "summary")}
    if not rest or rest[0].startswith("-"):
        raise ConfigError(f"the first argument must be a preset ({', '.join(preset_names())}) or a .toml file")
    clips = round(decimal_number(take["data"], "--data", default=0, minimum=1)) if take["data"] else 0
    world_size = whole_number(take["world-size"], "--world-size", default=0)
    _refuse_unread(take, flags, world_size=world_size, has_data=bool(clips))
    headroom = decimal_number(take["headroom"], "--headroom", default=HEADROOM, minimum=0.0)
    if headroom >= 1:
        raise ConfigError(f"--headroom {take['headroom']} must be below 1: it is a share of the GPU's memory")
    return Request(
        preset=rest[0],
        overrides=tuple(rest[1:]),
        world_size=world_size,
        gpu=take["gpu"],
        clip=Clip(
            whole_number(take["frames"], "--frames", default=81),
            whole_number(take["height"], "--height", default=480),
            whole_number(take["width"], "--width", default=832),
        ),
        is_json=flags["json"],
        is_search=flags["search"],
        is_summary=flags["summary"],
        runners_up=whole_number(take["runners-up"], "--runners-up", default=RUNNERS_UP, minimum=0),
        tokens=decimal_number(take["tokens"], "--tokens", default=0.0, minimum=1.0 if take["tokens"] else 0.0),
        headroom=headroom,
        calibration=take["calibration"],
        faults=_faults(take),
        clips=clips,
        data={
            name: decimal_number(take[name], f"--{name}", default=default, minimum=0.0)
            for name, default in _DATA_DEFAULTS.items()
        },
        store=take["store"] or "s3",
    )


_DATA_DEFAULTS = {"video-mb": 5.0, "epochs": 1.0, "months": 1.0, "encode-gpu-s": 0.0, "gpu-hour": 0.0}
_OPTIONS = (
    "world-size", "gpu", "frames", "height", "width", "tokens", "calibration", "headroom", "mtbf-gpu-hours",
    "restart-minutes", "storage-gb-s", "runners-up", "data", "store", *_DATA_DEFAULTS,
)  # fmt: skip
_DATA_ONLY = (*_DATA_DEFAULTS, "store")
_PLAN_ONLY = ("tokens", "headroom", "runners-up", "mtbf-gpu-hours", "restart-minutes", "storage-gb-s")


def _refuse_unread(take: dict[str, str], flags: dict[str, bool], *, world_size: int, has_data: bool) -> None:
    """Refuse what is missing, and what this command would not read.

    Raises:
        ConfigError: the first of them.
    """
    if not world_size and not has_data:
        raise ConfigError("--world-size N is missing: the number of GPUs")
    if not take["gpu"] and not take["calibration"] and world_size:
        raise ConfigError(
            f"--gpu GPU is missing: one of {', '.join(table())}; or --calibration FILE of a probe, whose machine it is"
        )
    for name in () if has_data else _DATA_ONLY:
        if take[name]:
            raise ConfigError(f"--{name} {take[name]} is read with --data only; add --data CLIPS or leave it out")
    for name in _PLAN_ONLY if has_data else ():
        if take[name]:
            raise ConfigError(f"--{name} {take[name]} is not read with --data; leave it out")
    for name in () if world_size else ("gpu", "calibration"):
        if take[name]:
            raise ConfigError(f"--{name} {take[name]} is read with --world-size N only; add it or leave --{name} out")
    if flags["search"] and has_data:
        raise ConfigError("--search is not read with --data; search first, then pass the layout's keys with --data")
    if flags["summary"] and (flags["json"] or has_data):
        raise ConfigError("--summary shortens the text of a plan; leave it out with --json and --data")
    if take["runners-up"] and not flags["search"]:
        raise ConfigError(f"--runners-up {take['runners-up']} is read with --search only; leave it out")


def _faults(take: dict[str, str]) -> Faults:
    usual = Faults()
    hours = decimal_number(take["mtbf-gpu-hours"], "--mtbf-gpu-hours", default=usual.mtbf_gpu_hours, minimum=0.0)
    minutes = decimal_number(take["restart-minutes"], "--restart-minutes", default=usual.restart_s / 60, minimum=0.0)
    storage = decimal_number(take["storage-gb-s"], "--storage-gb-s", default=0.0, minimum=0.0)
    if take["storage-gb-s"] and storage == 0:
        raise ConfigError("--storage-gb-s 0 must be above 0: a checkpoint would never be whole")
    return replace(usual, mtbf_gpu_hours=hours, restart_s=minutes * 60, storage_rate=storage * 1e9)


def _usage() -> str:
    from megavid.plan.goodput import LLAMA3_GPUS, LLAMA3_STORAGE_RATE
    from megavid.plan.storage import VIDEO_BYTES, store_names

    usual = Faults()
    return USAGE.format(
        presets="".join(f"\n{'':24}{name}" for name in preset_names()),
        gpus=", ".join(table()),
        headroom=HEADROOM,
        mtbf=usual.mtbf_gpu_hours,
        restart=usual.restart_s / 60,
        write=LLAMA3_STORAGE_RATE / LLAMA3_GPUS / 1e9,
        runners_up=RUNNERS_UP,
        video_mb=VIDEO_BYTES / 1e6,
        stores=", ".join(store_names()),
    )


# The answers, each as JSON and as text


Report = tuple[dict[str, Any], str]


def _plan(request: Request, config: RunConfig, gpu: Hardware) -> Report:
    from megavid.cli.plan_text import command_of, plan_text
    from megavid.plan.answer import plan_run
    from megavid.plan.workload import workload_of_clip

    answer = plan_run(config, workload_of_clip(config, *astuple(request.clip)), _job(request, gpu))
    command = command_of(request.preset, request.overrides, answer)
    table = {"preset": request.preset, **answer.to_json(), "command": command}
    return table, plan_text(request.preset, answer, command, is_summary=request.is_summary)


def _search(request: Request, config: RunConfig, gpu: Hardware) -> Report:
    from megavid.cli.plan_text import command_of, search_text
    from megavid.plan.search import search

    found = search(
        config,
        astuple(request.clip),
        _job(request, gpu),
        runners_up=request.runners_up,
        pinned=[item[2:].partition("=")[0] for item in request.overrides if item.startswith("--")],
    )
    rows = [
        {
            "preset": request.preset,
            **candidate.answer.to_json(),
            "command": command_of(request.preset, request.overrides, candidate.answer),
            "reason": candidate.reason,
        }
        for candidate in found.candidates
    ]
    table = {
        **rows[0],
        "candidates": rows,
        "too_large": [{**row.answer.to_json(), "reason": row.reason} for row in found.too_large],
        "search": found.counts,
        "notes": list(found.notes),
    }
    text = search_text(request.preset, request.overrides, found, is_summary=request.is_summary)
    return table, text


def _data(request: Request, config: RunConfig) -> int:
    from megavid.cli.plan_data import data_json, data_text
    from megavid.plan.storage import store

    clip, options = request.clip, request.data
    data = DataSet(
        clips=request.clips,
        frames=clip.frames,
        height=clip.height,
        width=clip.width,
        text_length=config.model.text_length,
        text_size=config.model.text_size,
        latents_of_clip=2 if config.model.task == "i2v" else 1,
        image_numbers=config.model.image_tokens * config.model.image_size,
        video_bytes=options["video-mb"] * 1e6,
        epochs=options["epochs"],
        months=options["months"],
        encode_gpu_s=options["encode-gpu-s"],
        gpu_hour=options["gpu-hour"],
    )
    answer = None
    if request.world_size:
        from megavid.plan.answer import plan_run
        from megavid.plan.workload import workload_of_clip

        workload = workload_of_clip(config, clip.frames, clip.height, clip.width)
        answer = plan_run(config, workload, _job(request, _machine(request)))
    prices = store(request.store)
    _print(data_json(data, prices, answer) if request.is_json else data_text(data, prices, answer))
    return 0


def _hindcast(rest: list[str]) -> int:
    from megavid.plan.calibration import FREE
    from megavid.plan.hindcast import hindcast, table_text

    is_json = take_flag(rest, "--json")
    if rest:
        raise ConfigError(f"--hindcast takes no other argument than --json, got {rest[0]!r}")
    found = hindcast()
    rows = [
        {
            "name": row.run.name,
            "source": f"{row.run.source.title}, {row.run.source.address}",
            "recipe": row.run.source.recipe,
            "publisher": row.run.source.publisher,
            "note": row.run.note,
            "published_step_s": row.published_s,
            "predicted_step_s": row.predicted_s,
            "published_mfu": row.published_mfu,
            "predicted_mfu": row.predicted_mfu,
            "error": row.error,
            "model_error": row.family_error,
            "publisher_error": row.publisher_error,
        }
        for row in found.rows
    ]
    table = {
        "rows": rows,
        "mean_error": found.mean_error,
        "mean_model_error": found.mean_family_error,
        "mean_publisher_error": found.mean_publisher_error,
        "fitted": {name: found.calibration.numbers()[name] for name in FREE},
    }
    _print(table if is_json else table_text(found))
    return 0


def _machine(request: Request) -> Hardware:
    """The machine of the table, or the one that was probed where none is named."""
    from megavid.plan.calibration import load_probe

    return hardware(request.gpu) if request.gpu else load_probe(Path(request.calibration))[0]


def _job(request: Request, gpu: Hardware) -> Job:
    from megavid.plan.calibration import gpu_calibration, load_calibration

    measured = load_calibration(Path(request.calibration)) if request.calibration else gpu_calibration()
    return Job(request.world_size, gpu, measured, request.faults, request.headroom, request.tokens)


def _print(report: dict[str, Any] | str) -> None:
    print(report if isinstance(report, str) else json.dumps(report, indent=1, allow_nan=False))
