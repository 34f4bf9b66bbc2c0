"""Memory and speed of ``megavid convert`` and ``upcycle`` on a checkpoint of 2 GB, beside cp and sha256sum on its disk.

    python tools/bench_convert.py [--folder DIR] [--gigabytes 2] [--rounds 2]

Writes a dense Wan model of random bf16 weights in diffusers' layout into DIR, then takes turns: ``cp`` and
``sha256sum`` of its files, and conversions, each in a process of its own. Prints bytes per second (hashes included) and
the peak of resident memory above an interpreter that has imported the same modules. Upcycling (eight experts of two
copies of the feed-forward) writes more than it reads; its speed is that of what it writes. cp leaves its bytes in the
page cache; convert returns when they are on the disk, so cp is also timed with a sync.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEASURED = """
import json, sys, time
from pathlib import Path
from megavid.checkpoint.convert import open_model, write_model
from megavid.checkpoint.convert import verify
from megavid.checkpoint.upcycle import Upcycling, upcycled

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

base = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
began = time.perf_counter()
if len(sys.argv) > 1:
    model, to = open_model(Path(sys.argv[1])), sys.argv[3]
    if to == "upcycled":
        model, to = upcycled(model, Upcycling(num_experts=8, top_k=4, granularity=4)), "megavid"
    write_model(model, Path(sys.argv[2]), to=to)
print(json.dumps({"seconds": time.perf_counter() - began, "base": base, "peak": resident("VmHWM")}))
"""
WAYS = (
    ("diffusers", "source", "megavid"),
    ("megavid", "a", "diffusers"),
    ("diffusers", "source", "original"),
    ("diffusers", "source", "upcycled"),
)


def make_source(folder: Path, gigabytes: float) -> None:
    """A folder of a dense model of about this size, of random bytes."""
    import torch
    from safetensors.torch import save_file

    from megavid.checkpoint.convert.configs import config_json
    from megavid.checkpoint.convert.tables import DIFFUSERS, links
    from megavid.config.schema import ModelConfig

    width = 2048
    layers = max(1, round(gigabytes * 1e9 / 2 / (16 * width * width)))
    model = ModelConfig(family="wan", num_layers=layers, hidden_size=width, num_heads=16, ffn_size=4 * width)
    folder.mkdir(parents=True)
    tensors = {
        link.other: torch.randint(-9000, 9000, link.shape, dtype=torch.int16).view(torch.bfloat16)
        for link in links(model, DIFFUSERS)
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json(model, "diffusers")))


def timed(command: list[str]) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def convert(*arguments: str) -> dict[str, float]:
    """A conversion in a process of its own: seconds, and resident bytes before and at the peak."""
    told = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    result: dict[str, float] = json.loads(told)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_convert-") as name:
        folder = Path(name)
        make_source(folder / "source", options.gigabytes)
        os.sync()
        size = sum(path.stat().st_size for path in (folder / "source").iterdir())
        print(f"{size / 1e9:.2f} GB of bf16 weights in {options.folder}")
        for round_number in range(1, options.rounds + 1):
            print(f"round {round_number}")
            compare(folder, size)


def compare(folder: Path, size: int) -> None:
    """One round: cp and sha256sum, then every way of converting."""
    source, copy = str(folder / "source"), str(folder / "copy")
    copied = timed(["cp", "-r", source, copy])
    synced = timed(["sync", "-f", copy])
    files = [str(path) for path in sorted((folder / "copy").iterdir())]
    hashed = timed(["sha256sum", *files])
    shutil.rmtree(copy)
    plain = copied + hashed
    rate = size / plain / 1e6
    print(f"  cp {copied:.2f} s + sha256sum {hashed:.2f} s: {rate:.0f} MB/s (sync of the copy: {synced:.2f} s more)")
    for layout, start, to in WAYS:
        target = folder / ("a" if to == "megavid" else "b")
        told = convert(str(folder / start), str(target), to)
        above = (told["peak"] - told["base"]) / 1e6
        written = sum(path.stat().st_size for path in target.iterdir())
        speed = written / told["seconds"] / 1e6
        print(
            f"  {layout} to {to}: {told['seconds']:.2f} s, {speed:.0f} MB/s, {speed / rate:.2f} of cp + sha256sum; "
            f"peak {above:.0f} MB above the interpreter's {told['base'] / 1e6:.0f} MB"
        )
        if target.name == "b":
            shutil.rmtree(target)
    shutil.rmtree(folder / "a")


if __name__ == "__main__":
    main()
