"""``megavid convert``: weights between megavid, diffusers and the original layout of Wan.

Owns the arguments and what is printed. The conversion is ``megavid.checkpoint.convert``'s.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megavid.cli.arguments import decimal_number, one_of, take_flag, take_option
from megavid.errors import ConfigError

if TYPE_CHECKING:
    from megavid.checkpoint.convert.job import ConvertRequest

HELP = "convert weights between megavid, diffusers and the original layout, checked"

USAGE = """\
usage: megavid convert SRC DST --to diffusers|megavid|original [options]
       megavid convert RUN DST --to lora [--ema]

  SRC                a megavid checkpoint (or the folder of a run), a transformer in diffusers' layout, an inference
                     folder of megavid, the original files of Wan 2.1 or 2.2, or a pipeline folder with one or two
                     transformers
  DST                a new folder; it appears when all of it is on the disk
  --to LAYOUT        diffusers: WanTransformer3DModel, or MegavidTransformer3DModel for a model with experts
                     megavid: a checkpoint that train.init_from takes; original: the files that Wan's makers publish
                     lora: the adapters alone of a run with lora.rank, as diffusers' load_lora_weights takes them (the
                     other layouts have them merged into the model)
  --dtype NAME       fp32, bf16 or fp16 matrices; norms, modulation, time embedder and routers stay fp32
                     (default: every tensor as it is stored)
  --dtype-of DIR     every tensor in the number format that it has in DIR, such as the model a run began with (not with
                     --to megavid)
  --ema              the moving average of the weights instead of the weights
  --max-shard-size S begin a new file beyond this (5GB)
  --verify           run both models on seeded inputs before DST appears (needs memory for both, in fp32); fail if a
                     block differs by more than rounding
  --optimizer        keep Adam's moments, and the histories of FP8, too (megavid to megavid)
  --pipeline DIR     copy VAE, text encoder, tokenizer and scheduler of the pipeline DIR, so that DST is one too
  --second SRC2      the low-noise expert beside SRC, the high-noise one (Wan 2.2 A14B)
  --boundary X       where inference switches between them: timestep / 1000 after the shift (Wan 2.2: 0.875, or 0.9 for
                     image-to-video); default: what the sources say
  --lora FILE        merge an adapter into the weights: a file in the naming of PEFT and diffusers, or its folder
  --lora-scale X     factor on that adapter (1)

An interrupted conversion goes on with the same command. Nothing is overwritten, and an error leaves nothing behind.
Beside the weights lies conversion.json (not with --to lora): SHA-256 of every tensor on both sides, checked when they
are read again.

Examples:
  megavid convert Wan2.1-T2V-14B-Diffusers/transformer wan_14b --to megavid --verify
  megavid train wan_14b --out runs/14b --train.init_from wan_14b --data.path SHARDS
  megavid convert runs/14b out --to diffusers --ema --dtype bf16 --pipeline Wan2.1-T2V-14B-Diffusers
  megavid convert Wan2.1-T2V-14B-Diffusers/transformer out --to diffusers --lora runs/style --verify
  megavid convert runs/high out --to diffusers --second runs/low --boundary 0.875 --pipeline Wan2.2-T2V-A14B-Diffusers
"""

DTYPES = ("fp32", "bf16", "fp16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str]) -> int:
    """Convert; see ``USAGE``. Returns the exit status, raises ``MegavidError`` for every other one than 0."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0

    from tqdm import tqdm

    from megavid.checkpoint.convert.job import ConvertJob

    if take_option(list(argv), "--to") == "lora":
        return write_adapter(argv)
    request, verifies = parse(argv)
    job = ConvertJob.of(request)
    for line in job.notices():
        print(line)
    if verifies:
        from megavid.cli.convert_verify import require_verifiable

        require_verifiable(job.sources, request.to)  # before anything is written
    with tqdm(total=job.nbytes, desc="converting", unit="B", unit_scale=True) as bar:
        if verifies:
            from megavid.cli.convert_verify import verify

            job.run(progress=bar.update, check=verify)
        else:
            job.run(progress=bar.update)
    tensors = sum(len(source.tensors) for source in job.sources)
    print(f"wrote {request.dst}: {tensors} tensors, {job.nbytes:,} bytes, {request.to}; hashes in conversion.json")
    return 0


def write_adapter(argv: Sequence[str]) -> int:
    """Write the adapters of a run; see ``USAGE``. Returns and raises as ``main``."""
    from megavid.checkpoint import Checkpoint, SingleRank, resolve
    from megavid.checkpoint.base import BASE
    from megavid.checkpoint.convert.adapter import ADAPTER, saved_adapter
    from megavid.checkpoint.convert.write import ASKED, clear_folder, new_folder, refuse_existing
    from megavid.errors import CheckpointError

    rest = list(argv)
    take_option(rest, "--to")
    weights = "ema" if take_flag(rest, "--ema") else "model"
    if len(rest) != 2 or any(item.startswith("-") for item in rest):
        raise ConfigError(f"--to lora takes RUN, DST and --ema only, got {' '.join(rest) or 'nothing'}")
    checkpoint, dst = Checkpoint(resolve(Path(rest[0]))), Path(rest[1])
    if BASE not in checkpoint.manifest.files:
        raise CheckpointError(f"{checkpoint.folder} is of a run of a whole model (lora.rank = 0): it has no adapters")
    refuse_existing(dst)
    adapter = saved_adapter(checkpoint, weights)
    with new_folder(dst, ASKED) as (partial, _):
        clear_folder(partial)
        checkpoint.verify(SingleRank())
        adapter.write(partial)
    print(f"wrote {dst / ADAPTER}")
    return 0


def parse(argv: Sequence[str]) -> "tuple[ConvertRequest, bool]":
    """The request in a command line, and whether to verify it.

    Raises:
        ConfigError: a missing, repeated or unknown argument.
    """
    import torch

    from megavid.checkpoint.convert.job import ConvertRequest
    from megavid.checkpoint.convert.target import MAX_SHARD_BYTES

    rest = list(argv)
    names = ("to", "dtype", "dtype-of", "max-shard-size", "pipeline", "second", "boundary", "lora", "lora-scale")
    text = {name: take_option(rest, f"--{name}") for name in names}
    use_ema, keep_optimizer, verifies = (take_flag(rest, f"--{name}") for name in ("ema", "optimizer", "verify"))
    for item in rest:
        if item.startswith("-"):
            raise ConfigError(f"unknown argument {item}; `megavid convert --help` lists all")
    if len(rest) != 2:
        raise ConfigError(f"two folders are needed, SRC and DST; got {len(rest)}: {' '.join(rest) or 'none'}")
    if not text["to"]:
        raise ConfigError("--to is missing: diffusers, megavid or original")
    dtypes = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if text["dtype"]:
        one_of(text["dtype"], "--dtype", DTYPES)
    request = ConvertRequest(
        src=Path(rest[0]),
        dst=Path(rest[1]),
        to=one_of(text["to"], "--to", ("diffusers", "megavid", "original")),
        command=shlex.join(["megavid", "convert", *argv]),
        dtype=dtypes[text["dtype"]],
        dtype_of=text["dtype-of"],
        use_ema=use_ema,
        keep_optimizer=keep_optimizer,
        max_shard_bytes=size_of(text["max-shard-size"], "--max-shard-size", default=MAX_SHARD_BYTES),
        base=text["pipeline"],
        second=text["second"],
        boundary=boundary_of(text["boundary"]),
        lora=text["lora"],
        lora_scale=decimal_number(text["lora-scale"], "--lora-scale", default=1.0, minimum=0.0),
    )
    return request, verifies


def boundary_of(text: str) -> float:
    """The boundary between two experts; 0 where it is not given."""
    from megavid.checkpoint.convert.pipeline import check_boundary

    return check_boundary(decimal_number(text, "--boundary", default=0.0, minimum=0.0), "--boundary") if text else 0.0


def size_of(text: str, name: str, *, default: int) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB; ``default`` where it is "".

    Raises:
        ConfigError: it is none.
    """
    if not text:
        return default
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise ConfigError(f"{name} {text} must be a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
