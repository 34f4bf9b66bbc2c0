"""``megavid sample`` of a folder that is served: the loop over prompts on one device.

Owns nothing of the sampler: packs, start noise, guidance and solvers are the same as for a training checkpoint, so that
the same weights, prompt and seed give the same clip.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megavid.cli.served import Served, check_pictures
from megavid.data.tokenizer import latent_shape
from megavid.data.video import fit_frame, read_image
from megavid.diffusion.samplers import sample, sampler_levels
from megavid.models.inputs import ModelInput
from megavid.ops.patches import Triple, patchify, token_grid, unpatchify
from megavid.training.kit import ClipSize
from megavid.training.sample_run import SampleRequest
from megavid.training.sampling import Prompt, Prompting, SamplerSettings, pictured

WAN_SIZE = (81, 480, 832)
"""Frames, height and width in pixels where nobody says otherwise: those of Wan's pipelines."""


def size_of(served: Served, request: SampleRequest) -> ClipSize:
    """Size and frame rate of the clips; by default the rate at which the model's time counts frames."""
    frames, height, width = WAN_SIZE
    own_rate = served.shape.latent_frame_rate * served.tokenizer.spec.temporal
    return ClipSize(
        frames=request.frames or frames,
        height=request.height or height,
        width=request.width or width,
        frame_rate=request.frame_rate or own_rate,
    )


@dataclass(frozen=True)
class ServedVelocity:
    """The velocity of packs that hold one clip each, all of one size.

    Attributes:
        served: the transformers.
        grid: tokens of a clip.
        latent_frame_rate: latent frames a second.
    """

    served: Served
    grid: Triple
    latent_frame_rate: float

    def __call__(self, inputs: ModelInput) -> Tensor:
        """[B, T, P] fp32."""
        patch_size, batch = self.served.shape.patch_size, len(inputs.packs)
        latents = torch.stack([unpatchify(clip, self.grid, patch_size) for clip in inputs.patches_BTP])
        has_rows = len(inputs.timestep_R) > batch  # known frames are at timestep 0
        timestep = inputs.timestep_R[inputs.row_BT] if has_rows else inputs.timestep_R
        velocity = self.served.at(float(inputs.timestep_R.max()))(
            latents,
            timestep,
            inputs.text_GLD,
            inputs.image_GLI,
            return_dict=False,
            attention_kwargs={"latent_frame_rate": self.latent_frame_rate},
        )[0].float()
        return torch.stack([patchify(clip, patch_size) for clip in velocity])


@torch.no_grad()
def sample_served(served: Served, request: SampleRequest, size: ClipSize, device: torch.device) -> list[Tensor]:
    """Latents of each prompt, [C, F, H, W] fp32 on the host.

    Raises:
        ConfigError: too few pictures for the model, or too many.
        DataError: the tokenizer has no latents of such a size.
        ValueError: the patch does not divide them.
    """
    model, spec = served.shape, served.tokenizer.spec
    check_pictures(served, len(request.images), request.checkpoint)
    _, *extent = latent_shape(spec, size.frames, size.height, size.width)
    grid = token_grid(extent[0], extent[1], extent[2], model.patch_size)
    velocity = ServedVelocity(served, grid, size.frame_rate / spec.temporal)
    levels = sampler_levels(request.sampler, request.steps, shift=served.shift)
    settings = SamplerSettings(request.steps, request.guidance, request.seed, request.sampler, request.negative)
    prompting = Prompting(model, served.text_encoder, spec.temporal, device)
    made = []
    with tqdm(total=request.steps * len(request.prompts), desc="sampling", unit="step") as bar:
        for number, text in enumerate(request.prompts):
            prompt = prompt_of(served, request.images, text, size)
            packs = prompting.packs(prompt, number, grid, grid[0] * grid[1] * grid[2], settings)
            noise = packs.start_noise(model.out_channels * model.patch_volume, request.seed)
            clean = sample(
                velocity,
                packs,
                noise,
                levels.sigmas,
                timesteps=levels.timesteps,
                kind=request.sampler,
                on_step=lambda done, total: bar.update(),
            )
            made.append(unpatchify(packs.clips_of(clean)[0].cpu(), grid, model.patch_size))
    return made


def prompt_of(served: Served, images: tuple[Path, ...], text: str, size: ClipSize) -> Prompt:
    """The prompt, with the pictures that its clip begins (and ends) with."""
    if not images:
        return Prompt(text, size)
    pictures = [fit_frame(read_image(file)[0], size.height, size.width) for file in images]
    return pictured(text, size, pictures, served.tokenizer, served.images)
