"""One rank of ``megavid sample``: weights from a checkpoint of any layout into this one, clips of prompts, files.

Owns what is asked for, which config that gives, and the files that come out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from megavid.checkpoint import Checkpoint, resolve
from megavid.checkpoint.base import Base
from megavid.config.deepspeed import DeepSpeedConfig
from megavid.config.load import with_flags
from megavid.config.schema import ModelConfig, ParallelConfig, RunConfig
from megavid.data.images import image_encoder_of_spec
from megavid.data.pictures import contact_sheet
from megavid.data.tokenizer import Frames
from megavid.data.video import fit_frame, read_image, write_gif, write_png, write_video
from megavid.diffusion.samplers import SamplerKind
from megavid.errors import ConfigError, StorageError
from megavid.models.runner import build_engine
from megavid.parallel.engine import Engine
from megavid.parallel.launch import Device, RankEnv
from megavid.parallel.mesh import Mesh
from megavid.parallel.world import open_mesh
from megavid.plan.layout import Layout
from megavid.training.kit import ClipSize, SamplingKit
from megavid.training.resume import config_of, has_average, load_weights
from megavid.training.sampling import Prompt, SamplerSettings, decode, grid_of, pictured, rounds, sample_latents


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What the command line asks for; 0 and "" stand for "as usual"."""

    checkpoint: Path
    prompts: tuple[str, ...]
    out: Path
    steps: int = 30
    guidance: float = 4.0
    seed: int = 0
    sampler: SamplerKind = "unipc"
    negative: str = ""
    frames: int = 0
    height: int = 0
    width: int = 0
    frame_rate: float = 0.0
    weights: str = ""
    tokenizer: str = ""
    images: tuple[Path, ...] = ()
    image_encoder: str = ""
    text_encoder: str = ""
    shift: float = 0.0
    has_gif: bool = False
    has_sheet: bool = False
    ranks: int = 1
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleJob:
    """A request, made ready: the checkpoint, its kit, and the config in the layout asked for."""

    request: SampleRequest
    checkpoint: Checkpoint
    config: RunConfig
    kit: SamplingKit
    size: ClipSize

    @classmethod
    def of(cls, request: SampleRequest, num_ranks: int) -> Self:
        """Everything that can be checked before ranks start.

        Raises:
            MegavidError: of the kind that fits.
        """
        for name, value in (("text-encoder", request.text_encoder), ("shift", request.shift)):
            if value:
                raise ConfigError(
                    f"--{name} {value} is for the folder of a transformer; {request.checkpoint} is a training "
                    "checkpoint, which brings its own"
                )
        checkpoint = Checkpoint(resolve(request.checkpoint))
        trained = config_of(checkpoint)
        if request.weights == "ema" and not has_average(trained):
            raise ConfigError(
                f"--weights ema: {checkpoint.folder} has none (optimizer.ema_decay = 0); use --weights model"
            )
        if trained.lora.rank:
            Base.read(checkpoint).open(trained.train.init_from)  # there, before ranks start
        kit = SamplingKit.load(checkpoint)
        size = ClipSize(
            frames=request.frames or kit.size.frames,
            height=request.height or kit.size.height,
            width=request.width or kit.size.width,
            frame_rate=request.frame_rate or kit.size.frame_rate,
        )
        grid_of(kit, size, trained.model.patch_size)
        kit.video_tokenizer(request.tokenizer)
        check_noise_range(trained, checkpoint.folder)
        check_pictures(request, trained.model, kit)
        make_folder(request.out)
        return cls(request, checkpoint, sampling_config(checkpoint, request.overrides, num_ranks), kit, size)


def check_noise_range(config: RunConfig, folder: Path) -> None:
    """Refuse to sample all noise levels with a model of some of them.

    Raises:
        ConfigError: it is one of two experts.
    """
    diffusion = config.diffusion
    if not diffusion.has_all_levels:
        raise ConfigError(
            f"{folder} is trained on noise levels {diffusion.sigma_min:g} to {diffusion.sigma_max:g} only, and "
            "sampling goes from 1 to 0; sample a pipeline folder of both experts, made with megavid convert --second"
        )


def check_pictures(request: SampleRequest, model: ModelConfig, kit: SamplingKit) -> None:
    """Refuse pictures that the model does not read, and prompts that lack one.

    Raises:
        ConfigError: too few pictures, or too many.
    """
    has_last = kit.condition.known == "first_last"
    least, most = {"t2v": (0, 0), "i2v": (1 + has_last,) * 2, "ti2v": (0, 1)}[model.task]
    if not least <= len(request.images) <= most:
        options = "--image FILE --last-image FILE" if has_last else "--image FILE"
        wanted = {0: "no --image", 1: options if least else f"{options} or none", 2: options}[most]
        raise ConfigError(
            f"{request.checkpoint} is trained with model.task = '{model.task}'"
            + (f" and --known {kit.condition.known}" if kit.condition.known else "")
            + f": it takes {wanted}, got {len(request.images)} pictures"
        )
    for file in request.images:
        read_image(file)


def make_folder(out: Path) -> None:
    """Make the folder that ``out`` goes to.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--out {out}: cannot make its folder: {error.strerror}") from error


def sampling_config(checkpoint: Checkpoint, overrides: Sequence[str], num_ranks: int) -> RunConfig:
    """The config of a checkpoint in another layout: ``overrides`` over the defaults of ``parallel``.

    The batch and pack sizes are of no meaning here; they are set so that they fit any layout of this many ranks. So is
    the backend, which has no part in running forward and would refuse layouts, and whose linears computed, because a
    checkpoint is sampled from where Transformer Engine is not.
    """
    trained = config_of(checkpoint)
    precision = replace(trained.precision, linears="native")
    train = replace(trained.train, backend="megatron", micro_batch_size=1, global_batch_size=num_ranks)
    data = replace(trained.data, pack_tokens=num_ranks)
    plain = replace(trained, parallel=ParallelConfig(), train=train, data=data, deepspeed=DeepSpeedConfig())
    plain = replace(plain, precision=precision)
    return with_flags(plain, overrides)


def load_engine(checkpoint: Checkpoint, config: RunConfig, mesh: Mesh, weights: str = "") -> Engine[Any]:
    """An engine without optimizer, with weights of a checkpoint: ``ema``, ``model``, or "" for ema if it has it.

    Ranks: collective.
    """
    engine = build_engine(config, mesh, with_optimizer=False)
    load_weights(engine, checkpoint, kind=weights or ("ema" if has_average(config) else "model"))
    return engine


def sample_rank(job: SampleJob, layout: Layout, device: Device, env: RankEnv) -> None:
    """One rank of the job; rank 0 writes the files."""
    request = job.request
    with open_mesh(job.config, layout, device, env) as mesh:
        engine = load_engine(job.checkpoint, job.config, mesh, request.weights)
        settings = SamplerSettings(request.steps, request.guidance, request.seed, request.sampler, request.negative)
        prompts = prompts_of(job)
        total = settings.steps * rounds(len(prompts), engine)
        with tqdm(total=total, desc="sampling", unit="step", disable=not mesh.is_main) as bar:
            latents = sample_latents(engine, job.kit, prompts, settings, on_step=bar.update)
        if mesh.is_main:
            clips = decode(job.kit.video_tokenizer(request.tokenizer), latents)
            write_clips(request, clips, job.size.frame_rate)
        mesh.barrier()


def prompts_of(job: SampleJob) -> list[Prompt]:
    """The request's prompts; all of them begin with its picture, if it has one."""
    request, size = job.request, job.size
    if not request.images:
        return [Prompt(text, size) for text in request.prompts]
    pictures = [fit_frame(read_image(file)[0], size.height, size.width) for file in request.images]
    images = None
    if job.config.model.image_size:
        images = image_encoder_of_spec(job.kit.condition, request.image_encoder)
    tokenizer = job.kit.video_tokenizer(request.tokenizer)
    return [pictured(text, size, pictures, tokenizer, images) for text in request.prompts]


def write_clips(request: SampleRequest, clips: Sequence[Frames], frame_rate: float) -> None:
    """Write every clip, and what else was asked for; say what was written."""
    for file, clip in zip(files_of(request.out, len(clips)), clips, strict=True):
        write_video(file, clip, frame_rate)
        print(f"wrote {file}")
        if request.has_gif:
            write_gif(file.with_suffix(".gif"), clip, frame_rate)
            print(f"wrote {file.with_suffix('.gif')}")
    if request.has_sheet:
        sheet = request.out.with_suffix(".png")
        write_png(sheet, contact_sheet([(text, [clip]) for text, clip in zip(request.prompts, clips, strict=True)]))
        print(f"wrote {sheet}")


def files_of(out: Path, count: int) -> list[Path]:
    """One file for each of ``count`` prompts: ``out`` itself, or numbered from 1."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{number}{out.suffix}") for number in range(1, count + 1)]
