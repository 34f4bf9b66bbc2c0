"""``megavid prepare SOURCE --out SHARD_DIR``: videos, images and captions become shards of latents.

Owns the options and what is printed; the work is ``megavid.data.prepare``'s.
"""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megavid.errors import ConfigError

if TYPE_CHECKING:
    from megavid.data.prepare import PrepareReport
    from megavid.data.prepare_shard import PrepareOptions

HELP = "turn videos, images and captions into shards of latents"

_DESCRIPTION = """\
Turn videos, images and captions into shards of latents that `megavid train` reads with
--data.kind shards --data.path SHARD_DIR.

SOURCE is a folder of videos and images, the caption of NAME.mp4 in NAME.txt beside it, or a table (.jsonl, .parquet)
with the columns path and caption, optionally start_s and end_s, and others (licence, ...), which are kept; names that
shards use themselves (source, frames, height, width, key, hash, ...) are refused.

The same command again keeps finished shards and makes the others. Several machines share the work with --num-ranks N
and --rank 0 ... N-1, or as a Slurm job array or `srun` job, where both are found by themselves; the last one to end
writes dataset.json."""


class _Parser(argparse.ArgumentParser):
    """Raises, so that a bad option is one line and exit status 2 like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"prepare: {message}; see `megavid prepare --help`")


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    options = _options(arguments)
    rank, num_ranks = _share(arguments)
    # Imported late, so that help answers at once.
    from tqdm import tqdm

    from megavid.data.prepare import prepare

    with tqdm(unit="item", desc="prepare", dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(1 if done < 0 else done)

        report = prepare(
            arguments.source, arguments.out, options,
            rank=rank, num_ranks=num_ranks, processes=arguments.ranks, on_progress=show,
        )  # fmt: skip
    _print(report, arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megavid prepare",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder or table")
    add("--out", type=Path, required=True, metavar="SHARD_DIR", help="folder for the shards")
    clips = parser.add_argument_group("clips")
    add = clips.add_argument
    add("--frames", type=int, default=17, help="frames of a clip, 1 + 4k (default %(default)s)")
    add("--height", type=int, default=96, help="pixels, a multiple of 8 (default %(default)s)")
    add("--width", type=int, default=96, help="pixels, a multiple of 8 (default %(default)s)")
    add(
        "--bucket", action="append", metavar="FxHxW",
        help="a size, such as 17x96x96, in place of the three above; may be repeated: a video goes to the height and "
        "width nearest in aspect, and is cut into the longest clips that it fills; an image goes there as one frame",
    )  # fmt: skip
    add("--frame-rate", type=float, default=0.0, help="resample videos to it; 0 (default) keeps each video's own")
    add("--stride", type=int, default=0, help="frames between the beginnings of two clips; 0 (default): side by side")
    add("--clips-per-video", type=int, default=0, help="clips at most of one video; 0 (default) for all")
    encoders = parser.add_argument_group("encoders")
    add = encoders.add_argument
    add("--tokenizer", default="dct", help="dct, dct-N (N channels), or the folder of an AutoencoderKLWan")
    add("--tokenizer-channels", type=int, help="latent channels (dct: 32)")
    add("--text-encoder", default="sentencepiece", help="sentencepiece (default), or the folder of a UMT5 or T5")
    add("--text-width", type=int, default=64, help="width of sentencepiece's features (default %(default)s)")
    add("--text-length", type=int, default=32, help="text tokens of a caption (default %(default)s; Wan: 512)")
    add(
        "--text", choices=("ids", "features"), default="ids",
        help="store token ids and let training encode captions (default), or store features too",
    )  # fmt: skip
    add(
        "--known", default="", metavar="RULE",
        help="store what image-to-video models are given of a clip, the latents of its known frames: first, first_last "
        "or first-N (frames); TI2V models need none of it",
    )  # fmt: skip
    add(
        "--image-encoder", default="", metavar="NAME",
        help="store image features of the known pictures too, for models with an image branch: the folder of a CLIP "
        "vision model (Wan 2.1's image_encoder), or colours-WIDTHxTOKENS",
    )  # fmt: skip
    add("--device", default="cpu", help="where encoders with weights compute, such as cuda:0")
    work = parser.add_argument_group("work")
    add = work.add_argument
    add("--shard-sources", type=int, default=256, help="videos and images of one shard (default %(default)s)")
    add("--max-bad", type=int, default=100, help="items that may be left out before it stops (default %(default)s)")
    add("--ranks", type=int, default=1, help="processes to start on this machine; they share its shards")
    add("--rank", type=int, help="this machine's number; default: of the Slurm array or job, else 0")
    add("--num-ranks", type=int, help="machines that share the work; default: of the Slurm array or job, else 1")
    return parser


def _options(arguments: argparse.Namespace) -> "PrepareOptions":
    for name, minimum in (
        ("frame_rate", 0), ("stride", 0), ("clips_per_video", 0), ("max_bad", 0), ("text_width", 1), ("text_length", 2),
        ("shard_sources", 1), ("ranks", 1),
    ):  # fmt: skip
        value = vars(arguments)[name]
        if not value >= minimum:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {minimum}")
    from megavid.data.clips import ClipRules
    from megavid.data.prepare_shard import PrepareOptions

    buckets = tuple(_bucket(text) for text in arguments.bucket or ())
    sizes = buckets or ((arguments.frames, arguments.height, arguments.width),)
    return PrepareOptions(
        rules=ClipRules(sizes, arguments.frame_rate, arguments.stride, arguments.clips_per_video),
        tokenizer=arguments.tokenizer,
        tokenizer_channels=arguments.tokenizer_channels,
        text_encoder=arguments.text_encoder,
        text_width=arguments.text_width,
        text_length=arguments.text_length,
        encode_text=arguments.text == "features",
        shard_sources=arguments.shard_sources,
        max_bad=arguments.max_bad,
        device=arguments.device,
        known=arguments.known,
        image_encoder=arguments.image_encoder,
    )


def _bucket(text: str) -> tuple[int, int, int]:
    match text.split("x"):
        case [frames, height, width] if all(part.isdecimal() for part in (frames, height, width)):
            return int(frames), int(height), int(width)
    raise ConfigError(f"--bucket {text} must be FRAMESxHEIGHTxWIDTH, such as 17x96x96")


def _share(arguments: argparse.Namespace) -> tuple[int, int]:
    """Rank and number of ranks: from the options, a Slurm job array, or the tasks of srun or torchrun.

    Raises:
        ConfigError: they would leave a part of the work to nobody.
    """
    if (arguments.rank is None) != (arguments.num_ranks is None):
        raise ConfigError("--rank and --num-ranks go together")
    if arguments.num_ranks is not None:
        return arguments.rank, arguments.num_ranks
    array = {name: os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT", "MIN", "MAX")}
    if array["ID"] and array["COUNT"]:
        count, first = int(array["COUNT"]), int(array["MIN"] or "0")
        if int(array["MAX"] or first + count - 1) != first + count - 1:
            raise ConfigError(
                f"this job array has {count} tasks from {first} to {array['MAX']}, which leave numbers out: no task "
                "would make their shards; submit the whole array again (finished shards are kept), or give --rank and "
                "--num-ranks"
            )
        return int(array["ID"]) - first, count
    from megavid.parallel.rank_env import RankEnv

    env = RankEnv.detect()
    return env.rank, env.world_size


def _print(report: "PrepareReport", out: Path) -> None:
    bad = [item for shard in report.shards for item in shard.bad]
    for item in bad:
        print(f"left out  {item.file}: {item.reason}")
    measured = [value for shard in report.shards for value in shard.psnr]
    samples = sum(shard.samples for shard in report.shards)
    sources = sum(shard.sources for shard in report.shards)
    print(f"clips     {samples} of {sources} videos and images, {len(bad)} left out")
    if measured:
        mean = sum(measured) / len(measured)
        print(f"decoded   {mean:.1f} dB PSNR against the clips on average, {min(measured):.1f} at worst "
              f"({len(measured)} clips measured)")  # fmt: skip
    if report.dataset is None:
        print(
            f"shards    {len(report.shards)} of {report.num_shards} are this rank's; the last rank writes dataset.json"
        )
        return
    buckets: Counter[tuple[int, int, int, int]] = Counter()
    for entry in report.dataset.shards:
        for shape, count in entry.buckets:
            buckets[shape] += count
    for shape, count in sorted(buckets.items()):
        print(f"bucket    {count} x latents {'x'.join(map(str, shape))} (channels x frames x height x width)")
    size = sum(entry.tar_bytes + entry.index_bytes for entry in report.dataset.shards)
    print(
        f"data set  {out}: {report.dataset.samples} clips in {len(report.dataset.shards)} shards, {size / 1e6:.2f} MB"
    )
    print(f"look      megavid inspect {out}")
    print(f"train     megavid train PRESET --data.kind shards --data.path {out} --out RUN_DIR")
