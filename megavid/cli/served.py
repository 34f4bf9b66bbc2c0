"""Folders that are served, opened for ``megavid sample``: a transformer alone, or a whole pipeline of diffusers.

Owns what such a folder must hold and what is said where it does not. From disk only, safetensors only: nothing is
downloaded and nothing unpickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavid.config.schema import ModelConfig
from megavid.errors import ConfigError, MegavidError

if TYPE_CHECKING:
    from megavid.data.images import ImageEncoder
    from megavid.data.text import TextEncoder
    from megavid.data.tokenizer import VideoTokenizer
    from megavid.diffusion.samplers import SamplerKind
    from megavid.inference import MegavidTransformer3DModel

INDEX, CONFIG = "model_index.json", "config.json"
TRANSFORMERS = ("MegavidTransformer3DModel", "WanTransformer3DModel")
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
PARTS = {"vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel", "tokenizer": "", "scheduler": ""}
"""Folders of a pipeline beside its transformers, and whose they must be."""
_UNIPC = {
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "solver_type": "bh2",
    "lower_order_final": True, "predict_x0": True, "final_sigmas_type": "zero", "use_dynamic_shifting": False,
}  # fmt: skip
"""What a scheduler_config.json must say, where it says it, for megavid's solver to be the same."""


@dataclass(frozen=True)
class Served:
    """A folder ready to sample from.

    Attributes:
        model: the transformer, of high noise where there are two.
        second: the transformer of low noise, or None.
        boundary: timestep at which ``second`` takes over, below it.
        text_encoder: reads prompts.
        tokenizer: decodes.
        shift: of the noise levels.
        shape: of the transformers, its task among it.
        images: the image encoder of a model with an image branch.
    """

    model: "MegavidTransformer3DModel"
    second: "MegavidTransformer3DModel | None"
    boundary: float
    text_encoder: "TextEncoder"
    tokenizer: "VideoTokenizer"
    shift: float
    shape: ModelConfig
    images: "ImageEncoder | None"

    def at(self, timestep: float) -> "MegavidTransformer3DModel":
        """The transformer of a timestep, as diffusers chooses it."""
        return self.model if self.second is None or timestep >= self.boundary else self.second


@dataclass(frozen=True, slots=True)
class ServedOptions:
    """What a transformer's folder does not say, or "" and 0.

    Attributes:
        tokenizer: name or folder of the video tokenizer.
        text_encoder: folder of a UMT5, or a SentencePiece model.
        image_encoder: folder of a CLIP vision model.
        shift: of the noise levels.
    """

    tokenizer: str = ""
    text_encoder: str = ""
    image_encoder: str = ""
    shift: float = 0.0


def is_served(path: Path) -> bool:
    """Whether ``path`` is a pipeline's folder or that of a transformer, not a training checkpoint."""
    return (path / INDEX).is_file() or ((path / CONFIG).is_file() and not (path / "manifest.json").is_file())


def open_served(path: Path, options: ServedOptions, sampler: "SamplerKind", device: "Any") -> Served:
    """Open a pipeline's folder or a transformer's.

    Raises:
        MegavidError: one line that says what is missing, or what cannot be sampled.
    """
    if (path / INDEX).is_file():
        return _open_pipeline(path, options, sampler, device)
    given = {"--tokenizer": options.tokenizer, "--text-encoder": options.text_encoder, "--shift": options.shift}
    if missing := [name for name, value in given.items() if not value]:
        raise ConfigError(
            f"{path} is a transformer alone and says nothing of {', '.join(missing)}; pass them, or give a pipeline "
            "folder (megavid convert --pipeline)"
        )
    return _assembled(path, [path], options, device)


def _open_pipeline(path: Path, options: ServedOptions, sampler: "SamplerKind", device: "Any") -> Served:
    from megavid.checkpoint.convert.pipeline import check_boundary, read_json

    index = read_json(path / INDEX)
    if index.get("_class_name") not in PIPELINES:
        raise ConfigError(f"{path / INDEX} is of a {index.get('_class_name')}; sampled are {', '.join(PIPELINES)}")
    is_pair = (index.get("transformer_2") or [None])[0] is not None
    names = ["transformer", *(["transformer_2"] if is_pair else []), *PARTS]
    if missing := [name for name in names if not (path / name).is_dir()]:
        raise ConfigError(f"{path} lacks the folders {', '.join(missing)}; megavid convert --pipeline BASE copies them")
    for name, wanted in PARTS.items():
        named = (index.get(name) or [None, None])[1]
        if wanted and named != wanted:
            raise ConfigError(f"{path / INDEX}: {name} is a {named}, sampled is {wanted}")
    boundary = 0.0
    if is_pair:
        boundary = 1000 * check_boundary(index.get("boundary_ratio"), f"{path / INDEX}: boundary_ratio")
    whole = ServedOptions(
        options.tokenizer or str(path / "vae"),
        options.text_encoder or str(path / "text_encoder"),
        options.image_encoder or (str(path / "image_encoder") if (path / "image_encoder").is_dir() else ""),
        options.shift or shift_of_scheduler(path / "scheduler" / "scheduler_config.json", sampler),
    )
    transformers = [path / name for name in names if name.startswith("transformer")]
    task = "ti2v" if index.get("expand_timesteps") is True else ""
    return _assembled(path, transformers, whole, device, boundary=boundary, task=task)


def _assembled(
    path: Path, transformers: list[Path], options: ServedOptions, device: "Any", boundary: float = 0.0, task: str = ""
) -> Served:
    """All parts loaded; ``task`` where the folder says one that the transformer's config has no word for."""
    # The small parts first: what is wrong with them is said before gigabytes are read.
    tokenizer = tokenizer_of(options.tokenizer, device)
    model, *others = (load_transformer(folder, device) for folder in transformers)
    shape = replace(model.shape, task="ti2v") if task == "ti2v" else model.shape
    served = Served(
        model,
        others[0] if others else None,
        boundary,
        text_encoder_of(options.text_encoder, model, device),
        tokenizer,
        options.shift,
        shape,
        _image_encoder_of(options.image_encoder, shape, path, device),
    )
    return _checked(served, path)


def _image_encoder_of(folder: str, shape: ModelConfig, path: Path, device: "Any") -> "ImageEncoder | None":
    from megavid.data.images import image_encoder_by_name

    if not shape.image_size:
        return None
    if not folder:
        raise ConfigError(f"{path} has an image branch; pass its image encoder: --image-encoder DIR")
    if Path(folder).is_dir():
        check_weights(Path(folder))
    return image_encoder_by_name(folder, str(device))


def check_pictures(served: Served, count: int, path: Path) -> None:
    """Refuse pictures that the model does not read, and calls that lack one.

    Raises:
        ConfigError: too few pictures, or too many.
    """
    shape = served.shape
    least, most = {"t2v": (0, 0), "i2v": (1 + bool(shape.image_positions), 2), "ti2v": (0, 1)}[shape.task]
    if not least <= count <= most:
        wanted = ("no --image", "--image FILE", "--image FILE and --last-image FILE")
        either = " or ".join(dict.fromkeys((wanted[least], wanted[most])))
        raise ConfigError(f"{path} has a model for task {shape.task}: it takes {either}, got {count} pictures")


def _checked(served: Served, path: Path) -> Served:
    """``served`` if its parts fit each other."""
    model, channels, width = served.model.shape, served.tokenizer.spec.channels, served.text_encoder.width
    if model.out_channels != channels:
        raise ConfigError(f"{path} predicts {model.out_channels} channels, its video tokenizer has {channels}")
    if model.text_size != width:
        raise ConfigError(f"{path} reads text features of width {model.text_size}, its text encoder gives {width}")
    if served.second is not None and served.second.shape != model:
        raise ConfigError(f"{path}: transformer and transformer_2 are not of one shape; convert them anew")
    return served


def shift_of_scheduler(file: Path, sampler: "SamplerKind") -> float:
    """Shift of the noise levels that a scheduler's config says.

    Raises:
        ConfigError: megavid's solvers are not that scheduler.
    """
    from megavid.checkpoint.convert.pipeline import read_json

    if not file.is_file():
        raise ConfigError(f"{file} is missing: the scheduler's config, which has the shift of the noise levels")
    fields = read_json(file)
    if fields.get("_class_name") == "UniPCMultistepScheduler":
        for key, wanted in _UNIPC.items():
            if key in fields and fields[key] != wanted:
                raise ConfigError(f"{file}: {key} = {fields[key]!r}, but megavid's unipc is with {wanted!r}")
        shift = fields.get("flow_shift", 1.0)
    elif fields.get("_class_name") == "FlowMatchEulerDiscreteScheduler" and sampler == "euler":
        shift = fields.get("shift", 1.0)
    else:
        raise ConfigError(
            f"{file} is of a {fields.get('_class_name')}, not what --sampler {sampler} does; pass --shift X to sample "
            "with megavid's solver all the same"
        )
    if not isinstance(shift, int | float) or not shift > 0:
        raise ConfigError(f"{file}: shift = {shift!r} must be a number above 0")
    return float(shift)


def check_weights(folder: Path) -> None:
    """Raise ``ConfigError`` unless ``folder`` has safetensors files."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    found = f"only {pickled[0]}, and pickled weights are not read" if pickled else "no weights at all"
    raise ConfigError(f"{folder} holds no *.safetensors ({found}); save it with safe_serialization=True")


def load_transformer(folder: Path, device: "Any") -> "MegavidTransformer3DModel":
    """The transformer of a folder: in bf16 on a GPU, in fp32 on a CPU.

    Raises:
        MegavidError: it is no transformer of Wan's family, or damaged.
    """
    import torch

    from megavid.checkpoint.convert.pipeline import read_json
    from megavid.checkpoint.convert.record import read_record
    from megavid.inference import MegavidTransformer3DModel

    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} has no {CONFIG} of a transformer")
    name = read_json(folder / CONFIG).get("_class_name")
    if name not in TRANSFORMERS:
        raise ConfigError(f"{folder / CONFIG} is of a {name}; sampled are {', '.join(TRANSFORMERS)}")
    check_weights(folder)
    options: dict[str, Any] = {}
    if name == "WanTransformer3DModel":  # what its config has no word for stands in a conversion's record
        record = read_record(folder)
        told: Mapping[str, Any] = record.model if record else {}
        options = {"family": "wan", **{key: told[key] for key in ("text_length", "latent_frame_rate") if key in told}}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model, told_of = MegavidTransformer3DModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    except MegavidError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be read as a {name}: {' '.join(str(error).split())}") from error
    for what in ("missing_keys", "unexpected_keys"):
        if told_of[what]:
            raise ConfigError(f"{folder}: {what.replace('_', ' ')}: {', '.join(sorted(told_of[what])[:4])}")
    loaded: MegavidTransformer3DModel = model.to(device).eval()
    return loaded


def text_encoder_of(name: str, model: "MegavidTransformer3DModel", device: "Any") -> "TextEncoder":
    """The text encoder of a folder (UMT5 or T5), or of a SentencePiece model's file.

    Raises:
        MegavidError: it is neither.
    """
    from megavid.data.text import SentencePieceEncoder, Umt5Encoder

    path, shape = Path(name), model.shape
    if path.is_dir():
        check_weights(path)
        return Umt5Encoder(path, shape.text_length, str(device))
    if not path.is_file():
        raise ConfigError(f"--text-encoder {name} is neither a folder nor the file of a SentencePiece model")
    return SentencePieceEncoder(path.read_bytes(), shape.text_size, shape.text_length)


def tokenizer_of(name: str, device: "Any") -> "VideoTokenizer":
    """The video tokenizer of this name or folder.

    Raises:
        MegavidError: there is none.
    """
    from megavid.data.tokenizer import tokenizer_by_name

    if Path(name).is_dir():
        check_weights(Path(name))
    return tokenizer_by_name(name, device=str(device))
