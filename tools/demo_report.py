#!/usr/bin/env python
"""Sample every caption of a small data set and hold each generated clip against every real one.

    python tools/demo_report.py runs/demo/run runs/demo/shards --out runs/demo/samples

Writes OUT/contact_sheet.png (the real row over the generated row), OUT/clip_N.mp4 and .gif, OUT/all.gif (real over
generated) and OUT/psnr.json, and prints the matrix of PSNR in dB. The real clip is what the tokenizer gives back of it:
no model of its latents can come nearer to the original. Exit status 0 where every generated clip is nearest to its own
real clip and their mean PSNR is at least --at-least; else 1.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megavid.checkpoint import Checkpoint, resolve
from megavid.data.pictures import contact_sheet, side_by_side
from megavid.data.shards import ShardSource
from megavid.data.tokenizer import Frames, psnr
from megavid.data.video import write_gif, write_png, write_video
from megavid.errors import MegavidError
from megavid.parallel.launch import RankEnv, init_distributed
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.kit import ClipSize, SamplingKit
from megavid.training.run import local_device
from megavid.training.sample_run import load_engine, sampling_config
from megavid.training.sampling import Prompt, SamplerSettings, decode, sample_latents


@dataclass(frozen=True)
class RealClip:
    """A clip of the data set, in pixels."""

    prompt: Prompt
    video: Frames


def read_clips(folder: Path, kit: SamplingKit) -> list[RealClip]:
    """Every clip of a folder of shards."""
    source, tokenizer = ShardSource(folder), kit.video_tokenizer()
    clips = []
    for index in range(len(source)):
        sample = source.read(index)
        video = tokenizer.decode(sample.latents_CFHW)
        frames, height, width, _ = video.shape
        size = ClipSize(frames, height, width, sample.frame_rate * kit.tokenizer.temporal)
        clips.append(RealClip(Prompt(sample.caption, size), video))
    source.close()
    return clips


def generate(
    checkpoint: Checkpoint, kit: SamplingKit, prompts: Sequence[Prompt], settings: SamplerSettings
) -> list[Frames]:
    """A clip for each prompt, on one rank."""
    config = sampling_config(checkpoint, [], 1)
    device = local_device(1)
    init_distributed(RankEnv(), device)
    with (
        Mesh.open(layout_of(config, 1), device) as mesh,
        tqdm(total=settings.steps * len(prompts), desc="sampling") as bar,
    ):
        engine = load_engine(checkpoint, config, mesh)
        latents = sample_latents(engine, kit, prompts, settings, on_step=bar.update)
    dist.destroy_process_group()
    return decode(kit.video_tokenizer(), latents)


def matrix(generated: Sequence[Frames], real: Sequence[Frames]) -> list[list[float]]:
    """PSNR in dB of each generated clip (row) to each real one (column); nan where their sizes differ."""
    return [[psnr(g, r) if g.shape == r.shape else math.nan for r in real] for g in generated]


def table(rows: Sequence[Sequence[float]]) -> str:
    """The matrix as text; a star marks the real clip that is nearest."""
    count = len(rows)
    lines = ["generated " + "".join(f"real {column + 1:<4}" for column in range(count))]
    for number, row in enumerate(rows):
        cells = (f"{value:5.2f}{'*' if column == nearest(row) else ' '}   " for column, value in enumerate(row))
        lines.append(f"{number + 1:>9} " + "".join(cells))
    return "\n".join(lines)


def nearest(row: Sequence[float]) -> int:
    """The real clip that a generated one is nearest to."""
    return max(range(len(row)), key=lambda column: -math.inf if math.isnan(row[column]) else row[column])


def write(out: Path, real: Sequence[RealClip], generated: Sequence[Frames], rows: list[list[float]]) -> None:
    """Write all files of the report."""
    out.mkdir(parents=True, exist_ok=True)
    for number, (clip, video) in enumerate(zip(real, generated, strict=True), start=1):
        write_video(out / f"clip_{number}.mp4", video, clip.prompt.size.frame_rate)
        write_gif(out / f"clip_{number}.gif", video, clip.prompt.size.frame_rate)
    groups = [(clip.prompt.text, [clip.video, video]) for clip, video in zip(real, generated, strict=True)]
    write_png(out / "contact_sheet.png", contact_sheet(groups, row_labels=("real", "generated")))
    pairs = side_by_side([[clip.video for clip in real], list(generated)])
    write_gif(out / "all.gif", pairs, real[0].prompt.size.frame_rate)
    captions = [clip.prompt.text for clip in real]
    report = {"captions": captions, "psnr_db": [[None if math.isnan(v) else round(v, 3) for v in row] for row in rows]}
    (out / "psnr.json").write_text(json.dumps(report, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint")
    parser.add_argument("shards", type=Path, help="the data set it was trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=30, help="solver steps (30)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance, 1 for none (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the start noise (0)")
    parser.add_argument("--at-least", type=float, default=18.0, help="mean PSNR in dB that the report asks for (18)")
    args = parser.parse_args(argv)
    try:
        checkpoint = Checkpoint(resolve(args.checkpoint))
        kit = SamplingKit.load(checkpoint)
        real = read_clips(args.shards, kit)
        settings = SamplerSettings(steps=args.steps, guidance=args.guidance, seed=args.seed)
        generated = generate(checkpoint, kit, [clip.prompt for clip in real], settings)
    except MegavidError as error:
        print(f"demo_report: error: {error}", file=sys.stderr)
        return error.exit_code
    rows = matrix(generated, [clip.video for clip in real])
    write(args.out, real, generated, rows)
    own = [row[number] for number, row in enumerate(rows)]
    hits, mean = sum(nearest(row) == number for number, row in enumerate(rows)), sum(own) / len(own)
    print(f"PSNR in dB, rows generated, columns real (* nearest):\n{table(rows)}")
    print(f"{hits} of {len(rows)} generated clips are nearest to their own real clip; mean PSNR {mean:.2f} dB")
    print(f"wrote {args.out / 'contact_sheet.png'}, all.gif, psnr.json and {len(rows)} clips as .mp4 and .gif")
    return 0 if hits == len(rows) and mean >= args.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
