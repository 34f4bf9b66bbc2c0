"""``megavid sample``: clips from prompts, with the weights of a checkpoint in any layout, or of a served folder.

Owns the arguments and the files that come out. The sampler's loop is ``megavid.training.sampling``'s.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megavid.cli.arguments import decimal_number, take_all, take_flag, take_option, whole_number
from megavid.cli.imports import importing
from megavid.cli.quiet import silence_known_warnings
from megavid.cli.served import ServedOptions, is_served, open_served
from megavid.errors import ConfigError
from megavid.plan.layout import layout_of

if TYPE_CHECKING:
    from megavid.training.sample_run import SampleRequest

HELP = "sample clips of prompts from a checkpoint in any layout, or from a pipeline folder"

USAGE = """\
usage: megavid sample FOLDER --prompt TEXT [--prompt TEXT ...] --out FILE.mp4 [options]

  FOLDER             a checkpoint, .../checkpoints/latest, or the folder of a run;
                     a pipeline of diffusers (model_index.json: one transformer, or two by noise level);
                     or a transformer alone, as megavid convert --to diffusers writes it
  --prompt TEXT      what to show; with several, the files are FILE_1.mp4, FILE_2.mp4, ...
  --out FILE.mp4     where to write
  --steps N          solver steps (30)
  --guidance X       classifier-free guidance, 1 for none (4)
  --negative TEXT    what guidance leads away from (the empty caption)
  --seed N           seed of the start noise (0)
  --sampler NAME     unipc or euler (unipc)
  --frames N, --height N, --width N, --fps X
                     size in pixels and frames per second (default: the usual size of the training data;
                     for a pipeline or a transformer 81 frames of 480 x 832, at the model's own rate)
  --image FILE       the first frame, for models that are trained on image to video (also: --last-image FILE, the last)
  --image-encoder DIR  the CLIP vision model of models with an image branch, if it is not where the data named it
                     (or, in a pipeline, in image_encoder/)
  --weights NAME     ema or model (ema, where the checkpoint has it)
  --tokenizer NAME   folder of the video tokenizer, for latents of one that has weights; dct-N for a transformer alone
  --text-encoder F   for a transformer alone: folder of a UMT5, or a checkpoint's vocabulary.model
  --shift X          shift of the noise levels, for a transformer alone (a pipeline's scheduler says it)
  --gif              write FILE.gif too
  --sheet            write FILE.png too: every clip as a row of frames
  --ranks N          ranks on this machine (1)
  --parallel.KEY V   layout to sample in (default: every rank its own prompts); see megavid train --help

--weights, --ranks and --parallel.* are for training checkpoints. Pipelines and transformers are read from disk alone,
from safetensors alone. The same weights, prompt, seed and size give the same clip from any of them.

Examples:
  megavid sample runs/tiny --prompt "a red ball" --out ball.mp4 --gif
  megavid sample Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" --out cat.mp4 --steps 50 --guidance 5
  megavid sample served --prompt "a red ball" --out ball.mp4 --tokenizer dct-32 --shift 1 \
      --text-encoder runs/tiny/checkpoints/latest/vocabulary.model --frames 9 --height 64 --width 64
"""

SAMPLERS = ("unipc", "euler")


def main(argv: Sequence[str]) -> int:
    """Sample; see ``USAGE``. Returns the exit status, raises ``MegavidError`` for every other one than 0."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    silence_known_warnings()

    with importing():
        import torch

        from megavid.parallel.launch import RankEnv, run_local_ranks
        from megavid.training.run import local_device
        from megavid.training.sample_run import SampleJob, sample_rank

    request = parse(argv)
    if is_served(request.checkpoint):
        return sample_folder(request)
    env = RankEnv.detect()
    num_ranks = env.world_size if env.world_size > 1 else request.ranks
    device = local_device(request.ranks)
    if env.world_size == 1 and num_ranks > 1:
        torch.set_num_threads(1)  # a pool of threads does not survive the fork of the ranks
    job = SampleJob.of(request, num_ranks)
    entry = functools.partial(sample_rank, job, layout_of(job.config, num_ranks), device)
    if env.world_size > 1:
        entry(env)
    else:
        run_local_ranks(entry, num_ranks, device)
    return 0


def sample_folder(request: "SampleRequest") -> int:
    """Sample from a pipeline's or a transformer's folder, on one device.

    Raises:
        MegavidError: of the kind that fits, one line.
    """
    import torch

    from megavid.cli.sample_served import sample_served, size_of
    from megavid.training.run import local_device
    from megavid.training.sample_run import make_folder, write_clips
    from megavid.training.sampling import decode

    for name, is_given in (
        ("--weights", bool(request.weights)),
        ("--ranks", request.ranks > 1),
        ("--parallel.*", bool(request.overrides)),
    ):
        if is_given:
            raise ConfigError(f"{name} is for training checkpoints; {request.checkpoint} is sampled on one device")
    make_folder(request.out)
    device = torch.device(local_device(1))
    options = ServedOptions(request.tokenizer, request.text_encoder, request.image_encoder, request.shift)
    served = open_served(request.checkpoint, options, request.sampler, device)
    size = size_of(served, request)
    latents = sample_served(served, request, size, device)
    write_clips(request, decode(served.tokenizer, latents), size.frame_rate)
    return 0


def parse(argv: Sequence[str]) -> "SampleRequest":
    """Take this command's own arguments; what is left are keys of ``parallel``.

    Raises:
        ConfigError: a missing, repeated or illegal argument.
    """
    from megavid.training.sample_run import SampleRequest

    rest = list(argv)
    text = {
        name: take_option(rest, f"--{name}")
        for name in (
            "out", "steps", "guidance", "seed", "sampler", "frames", "height", "width", "fps", "weights",
            "tokenizer", "ranks", "image", "last-image", "image-encoder",
            "negative", "text-encoder", "shift",
        )
    }  # fmt: skip
    prompts = tuple(take_all(rest, "--prompt"))
    has_gif, has_sheet = take_flag(rest, "--gif"), take_flag(rest, "--sheet")
    if not rest or rest[0].startswith("-"):
        raise ConfigError("the first argument must be a folder to sample from, such as runs/tiny/checkpoints/latest")
    if not prompts:
        raise ConfigError("--prompt TEXT is missing: what to sample")
    out = Path(text["out"])
    if out.suffix != ".mp4":
        raise ConfigError(f"--out {text['out'] or '(not given)'} must be a file that ends in .mp4")
    for name, known in (("sampler", SAMPLERS), ("weights", ("ema", "model"))):
        if text[name] and text[name] not in known:
            raise ConfigError(f"--{name} {text[name]} must be one of {', '.join(known)}")
    if text["last-image"] and not text["image"]:
        raise ConfigError(f"--last-image {text['last-image']} needs --image FILE: the first frame")
    for item in rest[1:]:
        if item.startswith("--") and not item.startswith("--parallel."):
            raise ConfigError(f"unknown argument {item}; of the config keys only --parallel.* may be given here")
    return SampleRequest(
        checkpoint=Path(rest[0]),
        prompts=prompts,
        out=out,
        steps=whole_number(text["steps"], "--steps", default=30),
        guidance=decimal_number(text["guidance"], "--guidance", default=4.0, minimum=0.0),
        seed=whole_number(text["seed"], "--seed", default=0, minimum=0),
        sampler="euler" if text["sampler"] == "euler" else "unipc",
        frames=whole_number(text["frames"], "--frames", default=0),
        height=whole_number(text["height"], "--height", default=0),
        width=whole_number(text["width"], "--width", default=0),
        frame_rate=decimal_number(text["fps"], "--fps", default=0.0, minimum=0.0),
        weights=text["weights"],
        negative=text["negative"],
        tokenizer=text["tokenizer"],
        images=tuple(Path(text[name]) for name in ("image", "last-image") if text[name]),
        image_encoder=text["image-encoder"],
        text_encoder=text["text-encoder"],
        shift=decimal_number(text["shift"], "--shift", default=0.0, minimum=0.0),
        has_gif=has_gif,
        has_sheet=has_sheet,
        ranks=whole_number(text["ranks"], "--ranks", default=1),
        overrides=tuple(rest[1:]),
    )
