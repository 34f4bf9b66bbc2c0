"""What a model is given of a clip beside its caption: known frames of video, and features of pictures among them.

Owns the one path from known frames to what a model reads, for training and sampling alike. Which frames of a clip are
known is a rule of the data set: ``first`` (image-to-video), ``first_last`` (the first and the last one), ``first-N``
(the first N: extension). A still image is made from its caption alone, and so is a clip that a rule would give whole.

Task ``i2v`` reads them in channels after the noised latents: Wan's mask (each frame of video 1 where it is known, the
frames of one latent frame side by side as channels, the first frame repeated) and the latents of the clip with
mid-grey in place of what is not known. With a causal VAE those are not the clip's own latents, so they are a member of
the sample. Task ``ti2v`` reads known latent frames where they stand; a tokenizer whose latent frames look ahead no
further than their own frames makes them from the known frames alone, so that the clip's own latents serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavid.config.schema import ModelConfig
from megavid.data.images import ImageEncoder
from megavid.data.sample import ConditionSpec, Sample
from megavid.data.tokenizer import Frames, VideoTokenizer
from megavid.errors import ConfigError, DataError

RULES = "first, first_last, first-N"
"""The rules, for messages."""


@dataclass(frozen=True)
class Given:
    """What one clip's model is given, ready to be packed.

    Attributes:
        frames: latent frames that are given clean (task ``ti2v``).
        channels_CFHW: mask and latents of what is known, fp32, in the channels after the noised ones (task ``i2v``).
        image_LI: image features, [model.image_length, model.image_size] fp32; None for a clip without image.
    """

    frames: tuple[int, ...] = ()
    channels_CFHW: Tensor | None = None
    image_LI: Tensor | None = None


def require_rule(rule: str, option: str) -> None:
    """Refuse what is not a rule.

    Raises:
        ConfigError: it is none.
    """
    head, _, number = rule.partition("-")
    if rule not in ("first", "first_last") and not (head == "first" and number.isdecimal() and int(number) > 0):
        raise ConfigError(f"{option} {rule!r} must be one of {RULES} (N frames)")


def known_frames(rule: str, frames: int) -> tuple[int, ...]:
    """Frames of a video of ``frames`` that the rule gives; none where all would be known."""
    require_rule(rule, "the rule of known frames")
    last = (frames - 1,) if rule == "first_last" else ()
    first = range(int(rule.partition("-")[2] or 1))
    known = (*first, *last)
    return known if len(known) < frames else ()


def pictures_of(rule: str, known: tuple[int, ...]) -> tuple[int, ...]:
    """Frames whose pictures an image encoder is shown: the first, and the last where the rule names it."""
    if not known:
        return ()
    return (known[0], known[-1]) if rule == "first_last" else known[:1]


def known_latent_frames(known: tuple[int, ...], latent_frames: int, temporal: int) -> tuple[int, ...]:
    """Latent frames all of whose frames of video are known; one has ``temporal`` frames, the first latent frame one."""
    given = set(known)
    groups = (range(max(0, temporal * (frame - 1) + 1), temporal * frame + 1) for frame in range(latent_frames))
    return tuple(frame for frame, group in enumerate(groups) if given.issuperset(group))


def mask_channels(known: tuple[int, ...], shape: tuple[int, int, int], temporal: int) -> Tensor:
    """Which frames of video are known, as channels of latents: [temporal, F, H, W] fp32 of ones and zeros.

    Channel c of latent frame f > 0 is frame temporal * (f - 1) + 1 + c; all channels of the first are frame 0.

    Args:
        known: known frames of video.
        shape: latent frames, height and width.
        temporal: frames of video in a latent frame.

    Source: Wan 2.1 I2V (arXiv:2503.20314), in the order of diffusers' WanImageToVideoPipeline.
    """
    latent_frames, height, width = shape
    shown = torch.zeros(1 + temporal * (latent_frames - 1))
    shown[list(known)] = 1.0
    rows = torch.cat((shown[:1].expand(temporal), shown[1:])).view(latent_frames, temporal)
    return rows.t()[:, :, None, None].expand(temporal, latent_frames, height, width).contiguous()


def condition_spec(rule: str, images: ImageEncoder | None, file: str = "") -> ConditionSpec:
    """What samples carry that ``with_known`` made."""
    if images is None or not rule:
        return ConditionSpec(known=rule)
    return ConditionSpec(rule, images.name, images.version, images.width, images.length, file)


def with_known(
    sample: Sample, video_FHW3: Frames, rule: str, tokenizer: VideoTokenizer, images: ImageEncoder | None
) -> Sample:
    """The same sample with what models are given of its video.

    Args:
        sample: the clip.
        video_FHW3: its frames.
        rule: which of them are known.
        tokenizer: the one that made its latents.
        images: encoder of known pictures; None for none.
    """
    known = known_frames(rule, len(video_FHW3))
    condition_CFHW = tokenizer.encode(video_FHW3, known).to(sample.latents_CFHW.dtype)
    shown = [video_FHW3[frame] for frame in pictures_of(rule, known)]
    image_LI = images.encode(shown) if images is not None and shown else None
    return replace(sample, known=known, condition_CFHW=condition_CFHW, image_LI=image_LI)


def given_of(sample: Sample, model: ModelConfig, temporal: int) -> Given:
    """What ``model`` is given of a sample.

    Args:
        sample: a clip, with the members that its data set was prepared with.
        model: its task and image branch say what it reads.
        temporal: frames of video in a latent frame.

    Raises:
        DataError: a member that the model reads is missing, or has another shape.
    """
    _, latent_frames, height, width = sample.shape
    if model.task == "t2v":
        return Given()
    if model.task == "ti2v":
        known = sample.known or known_frames("first", 1 + temporal * (latent_frames - 1))
        return Given(frames=known_latent_frames(known, latent_frames, temporal))
    if sample.condition_CFHW is None or sample.condition_CFHW.shape != sample.latents_CFHW.shape:
        raise DataError(
            f"{sample.key} carries no latents of its known frames, which model.task = 'i2v' reads; prepare the data "
            "again with --known first"
        )
    mask_CFHW = mask_channels(sample.known, (latent_frames, height, width), temporal)
    channels_CFHW = torch.cat((mask_CFHW, sample.condition_CFHW.float()))
    return Given(channels_CFHW=channels_CFHW, image_LI=_image(sample, model))


def _image(sample: Sample, model: ModelConfig) -> Tensor | None:
    if not model.image_size or sample.image_LI is None:
        return None
    wanted = (model.image_length, model.image_size)
    if tuple(sample.image_LI.shape) != wanted:
        raise DataError(
            f"{sample.key} has image features of shape {tuple(sample.image_LI.shape)}, but model.image_length x "
            f"model.image_size = {wanted[0]} x {wanted[1]}; prepare the data again with the model's image encoder"
        )
    return sample.image_LI.float()


def image_features(given: Sequence[Given], model: ModelConfig) -> tuple[Tensor | None, Tensor | None]:
    """Image features of clips, [G, L, I] fp32, zero for a clip without image, and which have one, [G] bool; two times
    None for a model without image branch."""
    if not model.image_size:
        return None, None
    image_GLI = torch.zeros(len(given), model.image_length, model.image_size)
    for number, clip in enumerate(given):
        if clip.image_LI is not None:
            image_GLI[number] = clip.image_LI
    return image_GLI, torch.tensor([clip.image_LI is not None for clip in given], dtype=torch.bool)
