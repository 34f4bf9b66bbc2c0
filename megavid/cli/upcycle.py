"""``megavid upcycle``: a dense model becomes a mixture of experts that computes the same function.

Owns the arguments and what is printed. What is computed is ``megavid.checkpoint.upcycle``'s.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megavid.cli.arguments import decimal_number, one_of, take_option, whole_number
from megavid.cli.convert import size_of
from megavid.errors import ConfigError

if TYPE_CHECKING:
    from megavid.checkpoint.convert import ModelSource
    from megavid.checkpoint.upcycle import Upcycling

HELP = "make a dense model a mixture of experts that computes the same function"

USAGE = """\
usage: megavid upcycle DENSE DST --experts N --top-k N --granularity N [options]

  DENSE              a dense model: a megavid checkpoint (or the folder of a run), a transformer in diffusers' layout,
                     or the original files of Wan
  DST                a new folder; it appears when all of it is on the disk
  --experts N        routed experts of one layer; a multiple of the granularity
  --top-k N          experts that each token goes to; a multiple of the granularity, at least 2
  --granularity N    experts that one copy of the dense feed-forward is cut into: there are experts / granularity
                     copies, each expert is feed-forward / granularity wide, and a token goes to top-k / granularity
                     copies to begin with
  --router KIND      sigmoid (default): scores of their own, kept in balance by a bias; route_scale = granularity.
                     softmax: scores that sum to 1; train it with model.moe.aux_loss_weight
  --dense-first N    layers at the beginning that stay dense (0)
  --dense-last N     layers at the end that stay dense (0)
  --seed N           of the router's rows (1234)
  --noise X          deviation of the router's logits to begin with, as a part of a fresh router's; at most 2 (1.0)
  --to LAYOUT        megavid (default): a checkpoint that train.init_from takes; diffusers: a folder that
                     megavid.inference.MegavidTransformer3DModel loads
  --weights KIND     of a megavid checkpoint: ema or model; default: its moving average where it has one
  --dtype NAME       fp32, bf16 or fp16 matrices (default: as they are stored)
  --max-shard-size S begin a new file beyond this (5GB)

At step 0 the result computes exactly what the dense model does, for any top-k that is allowed; what would not is
refused. It is written one part of a tensor at a time, with conversion.json beside the weights; the same command goes on
after an interruption. docs/upcycle.md says why.

Examples:
  megavid upcycle Wan2.1-T2V-14B-Diffusers/transformer wan_100b --experts 64 --top-k 8 --granularity 4 --dtype bf16
  megavid train wan_moe_100b_a20b --out runs/100b --train.init_from wan_100b --data.path SHARDS
  megavid upcycle runs/dense experts --experts 16 --top-k 4 --granularity 2 --dense-first 2 --dense-last 2
  megavid train experts/run.toml --out runs/experts --train.init_from experts
"""

COUNTS = {"experts": "--experts", "top_k": "--top-k", "granularity": "--granularity"}


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    dense: Path
    dst: Path
    how: "Upcycling"
    to: str
    weights: str
    dtype: str
    max_shard_bytes: int
    command: str


def main(argv: Sequence[str]) -> int:
    """Upcycle; see ``USAGE``. Returns the exit status, raises ``MegavidError`` for every other one than 0."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    request = parse(argv)

    import torch
    from tqdm import tqdm

    from megavid.checkpoint.convert import write_model
    from megavid.checkpoint.upcycle import upcycled
    from megavid.plan.parameters import count

    dense, kind = open_dense(request)
    for line in dense.notes:
        print(line)
    result = upcycled(dense, request.how)
    counts, before = count(result.config), count(dense.config)
    print(
        f"{dense.path} ({kind}): {before.total:,} parameters; upcycled: {counts.total:,}, {counts.active:,} active, "
        f"{request.how.copies} copies of the feed-forward"
    )
    dtype = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[request.dtype]
    size = sum(tensor.numel * (dtype or tensor.dtype).itemsize for tensor in result.tensors.values())
    with tqdm(total=size, desc="upcycling", unit="B", unit_scale=True) as bar:
        write_model(
            result,
            request.dst,
            to=request.to,
            dtype=dtype,
            max_shard_bytes=request.max_shard_bytes,
            command=request.command,
            progress=bar.update,
        )
    print(f"wrote {request.dst}: {len(result.tensors)} tensors, {request.to}; hashes in conversion.json")
    if request.to == "megavid":
        print(f"next: megavid train {request.dst / 'run.toml'} --out DIR --train.init_from {request.dst}")
    return 0


def parse(argv: Sequence[str]) -> Request:
    """The request in a command line.

    Raises:
        ConfigError: a missing, repeated or unknown argument, or a number that is none.
    """
    from megavid.checkpoint.convert.target import MAX_SHARD_BYTES
    from megavid.checkpoint.upcycle import Upcycling

    rest = list(argv)
    names = (*COUNTS.values(), "--router", "--dense-first", "--dense-last", "--seed", "--noise", "--to", "--weights")
    text = {name: take_option(rest, name) for name in (*names, "--dtype", "--max-shard-size")}
    for item in rest:
        if item.startswith("-"):
            raise ConfigError(f"unknown argument {item}; `megavid upcycle --help` lists all")
    if len(rest) != 2:
        raise ConfigError(f"two folders are needed, DENSE and DST; got {len(rest)}: {' '.join(rest) or 'none'}")
    for name in COUNTS.values():
        if not text[name]:
            raise ConfigError(f"{name} is missing: {name} N; `megavid upcycle --help` says what it is")
    experts, top_k, granularity = (whole_number(text[name], name, default=0) for name in COUNTS.values())
    router = one_of(text["--router"] or "sigmoid", "--router", ("sigmoid", "softmax", "expert_choice"))
    how = Upcycling(
        num_experts=experts,
        top_k=top_k,
        granularity=granularity,
        router=router,  # type: ignore[arg-type]  # what it cannot be, ``Upcycling.model_of`` refuses with the reason
        dense_first=whole_number(text["--dense-first"], "--dense-first", default=0, minimum=0),
        dense_last=whole_number(text["--dense-last"], "--dense-last", default=0, minimum=0),
        seed=whole_number(text["--seed"], "--seed", default=1234, minimum=0),
        noise=decimal_number(text["--noise"], "--noise", default=1.0, minimum=0.0),
    )
    return Request(
        dense=Path(rest[0]),
        dst=Path(rest[1]),
        how=how,
        to=one_of(text["--to"] or "megavid", "--to", ("megavid", "diffusers")),
        weights=text["--weights"] and one_of(text["--weights"], "--weights", ("ema", "model")),
        dtype=text["--dtype"] and one_of(text["--dtype"], "--dtype", ("fp32", "bf16", "fp16")),
        max_shard_bytes=size_of(text["--max-shard-size"], "--max-shard-size", default=MAX_SHARD_BYTES),
        command=shlex.join(["megavid", "upcycle", *argv]),
    )


def open_dense(request: Request) -> "tuple[ModelSource, str]":
    """The dense model, and which of its weights are taken: its moving average where it has one, unless asked otherwise.

    Raises:
        CheckpointError: there is no such model, or no such weights.
    """
    from megavid.checkpoint.convert import open_model

    weights = request.weights or "model"
    source = open_model(request.dense, weights=weights if request.weights else "")
    if not request.weights and source.run.optimizer.ema_decay > 0:
        weights, source = "ema", open_model(request.dense, weights="ema")
    return source, {"model": "its weights", "ema": "the moving average of its weights"}[weights]
