"""``MegavidTransformer3DModel``: the trained transformer as a diffusers model, dense and with experts.

Owns the interface that ``WanPipeline`` and its relatives call, and the order of things from latents to velocity. Plain
PyTorch on the shared math of ``megavid.ops``: no megatron-core, no trainer.
"""

import math
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from megavid.config.schema import ModelConfig
from megavid.errors import ConfigError
from megavid.inference.block import MegavidTransformerBlock
from megavid.inference.embedders import ConditionEmbedder
from megavid.inference.expert_parallel import Inputs, exchange_over, keep_experts_
from megavid.inference.fp8 import Fp8Linear
from megavid.inference.moe import ExpertMatrix, Fp8ExpertMatrix, MoEFeedForward
from megavid.inference.shape import config_of_model, model_of_config
from megavid.ops.norm import modulated_norm, wide
from megavid.ops.patches import token_grid
from megavid.ops.rope import place_code, rope_angles

Triple = tuple[int, int, int]
CALL_OPTIONS = ("latent_frame_rate",)
"""Keys that ``attention_kwargs`` of a call may have."""


class MegavidTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):  # type: ignore[misc]
    """Velocity of noised latents, for ``WanPipeline(transformer=...)``.

    The arguments are the keys of ``config.json``: those of diffusers' ``WanTransformer3DModel``, and those of
    megavid's ``model`` and ``model.moe`` tables (``megavid.inference.shape`` says which is which).

    Args:
        weight_format: "plain", or "fp8_e4m3" for a folder that was saved after ``quantize_fp8_``.

    Raises:
        ConfigError: a shape that cannot be.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["MegavidTransformerBlock"]  # noqa: RUF012  # diffusers declares it so
    _repeated_blocks = ["MegavidTransformerBlock"]  # noqa: RUF012
    # Parts of names that stay fp32 in every dtype: as in training, hence more than diffusers keeps of Wan.
    _keep_in_fp32_modules = [  # noqa: RUF012
        "time_embedder", "time_proj", "scale_shift_table", "norm1", "norm2", "norm_q", "norm_k", "norm_added_k",
        "router", "weight_scale",
    ]  # fmt: skip
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm", "router"]  # noqa: RUF012

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: Triple = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        family: str = "wan_moe",
        num_experts: int = 8,
        top_k: int = 2,
        expert_ffn_dim: int = 256,
        shared_ffn_dim: int = 0,
        activation: str = "gelu",
        has_bias: bool = True,
        router: str = "sigmoid",
        route_scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        dense_first: int = 1,
        dense_last: int = 1,
        absolute_positions: bool = False,
        latent_frame_rate: float = 4.0,
        text_length: int = 512,
        weight_format: str = "plain",
    ) -> None:
        super().__init__()
        self.shape = model = model_of_config(self.config)
        width, has_image = model.hidden_size, added_kv_proj_dim is not None
        if has_image != (image_dim is not None) or added_kv_proj_dim not in (None, width):
            raise ConfigError(
                f"config.json: image_dim = {image_dim} and added_kv_proj_dim = {added_kv_proj_dim} must both be given "
                f"or neither, the second equal to the model's width {width}"
            )
        self.patch_embedding = nn.Conv3d(in_channels, width, kernel_size=model.patch_size, stride=model.patch_size)
        self.condition_embedder = ConditionEmbedder(
            width, freq_dim, text_dim, image_size=image_dim or 0, image_positions=pos_embed_seq_len or 0
        )
        self.blocks = nn.ModuleList(MegavidTransformerBlock(model, n, has_image) for n in range(num_layers))
        self.proj_out = nn.Linear(width, model.out_channels * model.patch_volume)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) * width**-0.5)
        if weight_format == "fp8_e4m3":
            self._replace_matrices()

    @classmethod
    def of_model(cls, model: ModelConfig) -> Self:
        """A model of this shape with fresh random weights (on the default device, which may be meta)."""
        made: Self = cls.from_config(config_of_model(model))
        return made

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> Self:
        """The model of a folder; the options of diffusers' ``ModelMixin.from_pretrained``, pickled weights excepted.

        Raises:
            ConfigError: ``use_safetensors=False``.
        """
        if options.get("use_safetensors") is False:
            raise ConfigError(f"{folder}: pickled weights are not read; pass a folder of safetensors")
        model: Self = super().from_pretrained(folder, **{**options, "use_safetensors": True})
        return model

    @torch.no_grad()
    def quantize_fp8_(self) -> Self:
        """Keep the matrices of all blocks in eight bits from now on (``megavid.inference.fp8``); returns the model.

        Embedders, norms, router and head stay as they are. ``save_pretrained`` writes the eight bits.
        """
        if self.config.weight_format != "fp8_e4m3":
            self._replace_matrices()
            self.register_to_config(weight_format="fp8_e4m3")
        return self

    def shard_experts_(self, group: Any, inputs: Inputs = "same") -> Self:
        """Keep the experts of this rank only, and exchange tokens with the others of ``group``; returns the model.

        Args:
            group: a torch.distributed process group, whose size divides the number of experts.
            inputs: "same": every rank is called with the same latents and gets the same velocity. "own": with its own,
                but all ranks equally often.

        Raises:
            ConfigError: no experts, or a number that the group does not divide.
        """
        exchange = exchange_over(group, self.shape, inputs)
        for module in self.modules():
            if isinstance(module, MoEFeedForward):
                keep_experts_(module.experts, exchange.first, exchange.first + exchange.local)
                module.exchange = exchange
        return self

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity of B clips of one size.

        Args:
            hidden_states: noised latents, with what image-to-video adds to their channels, [B, C, F, H, W].
            timestep: 1000 * noise level of each clip [B], or of each token [B, T].
            encoder_hidden_states: text features [B, L, width], zero behind a caption's end.
            encoder_hidden_states_image: features of an image encoder [B, tokens, width], for models that read them.
            return_dict: give a ``Transformer2DModelOutput``, else a tuple of one tensor.
            attention_kwargs: {"latent_frame_rate": latent frames a second of these clips}; without it, the model's
                own rate, at which time counts frames.

        Returns:
            [B, C, F, H, W] in the dtype of the weights.

        Raises:
            ConfigError: a shape or an option that the model does not have.
        """
        model = self.shape
        _, _, frames, height, width = hidden_states.shape
        grid = token_grid(frames, height, width, model.patch_size)
        self._check(hidden_states, grid, timestep, encoder_hidden_states, encoder_hidden_states_image)
        place_1T3 = places(grid, self._frame_step(attention_kwargs), hidden_states.device)
        x_BTD = self.patch_embedding(hidden_states.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if model.absolute_positions:
            x_BTD = x_BTD + place_code(place_1T3, model.hidden_size).to(x_BTD.dtype)
        x_BTD = x_BTD.contiguous()
        timestep_R, row_BT = timestep_table(timestep, math.prod(grid))
        head_RD, modulation_R6D, text_BLD, image_BxD = self.condition_embedder(
            timestep_R, encoder_hidden_states, encoder_hidden_states_image
        )
        angles = rope_angles(place_1T3, model.head_size).unsqueeze(2)
        cos, sin = (x.to(modulation_R6D.dtype) for x in (angles.cos(), angles.sin()))
        for block in self.blocks:
            x_BTD = block(x_BTD, text_BLD, image_BxD, modulation_R6D, row_BT, cos, sin)
        shift_RD, scale_RD = (wide(self.scale_shift_table)[0, i].to(head_RD) + head_RD for i in (0, 1))
        # With blocks on several devices the last ones need not be where the first were.
        shift_RD, scale_RD, row_BT = (x.to(x_BTD.device) for x in (shift_RD, scale_RD, row_BT))
        patches_BTP = self.proj_out(modulated_norm(x_BTD, shift_RD, scale_RD, row_BT, model.norm_eps))
        velocity = unpatchify_channels_last(patches_BTP, grid, model.patch_size)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _replace_matrices(self) -> None:
        for module in list(self.blocks.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Fp8Linear(child))
                elif isinstance(child, ExpertMatrix):
                    setattr(module, name, Fp8ExpertMatrix(child))

    def _frame_step(self, attention_kwargs: dict[str, Any] | None) -> float:
        """Steps of RoPE's time axis from one latent frame to the next."""
        options = attention_kwargs or {}
        if unknown := options.keys() - set(CALL_OPTIONS):
            raise ConfigError(f"attention_kwargs has {', '.join(sorted(unknown))}; known: {', '.join(CALL_OPTIONS)}")
        own = self.shape.latent_frame_rate
        return own / float(options.get("latent_frame_rate", own))

    def _check(self, latents: Tensor, grid: Triple, timestep: Tensor, text: Tensor, image: Tensor | None) -> None:
        """Raise ``ConfigError`` unless the arguments are of this model."""
        model, batch, limit = self.shape, latents.shape[0], self.config.rope_max_seq_len
        if latents.shape[1] != model.in_channels:
            raise ConfigError(f"hidden_states has {latents.shape[1]} channels, this model takes {model.in_channels}")
        if max(grid) > limit:
            raise ConfigError(f"a clip of {grid} tokens has an axis beyond rope_max_seq_len = {limit} of config.json")
        if tuple(text.shape) != (batch, model.text_length, model.text_size):
            raise ConfigError(
                f"encoder_hidden_states has shape {tuple(text.shape)}, this model takes "
                f"{(batch, model.text_length, model.text_size)}; pass max_sequence_length={model.text_length} to the "
                "pipeline, and the text encoder that the model was trained with"
            )
        if tuple(timestep.shape) not in ((batch,), (batch, math.prod(grid))):
            raise ConfigError(
                f"timestep has shape {tuple(timestep.shape)}, it must be [{batch}] or [{batch}, {math.prod(grid)}]"
            )
        if (image is not None) != (self.config.image_dim is not None):
            takes = "needs" if image is None else "takes no"
            raise ConfigError(f"this model (image_dim = {self.config.image_dim}) {takes} encoder_hidden_states_image")


def places(grid: Triple, frame_step: float, device: torch.device) -> Tensor:
    """Time, row and column of every token of a clip, [1, T, 3] fp32 (``megavid.ops.packs.positions``)."""
    axes = [torch.arange(extent, dtype=torch.float32, device=device) for extent in grid]
    place = torch.stack(torch.meshgrid(axes[0] * frame_step, axes[1], axes[2], indexing="ij"), dim=-1)
    return place.reshape(1, -1, 3)


def timestep_table(timestep: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The timesteps without repeats, [R], and the row of every token, [B, T].

    A table of rows, as in training: modulation of each token would take gigabytes.
    """
    if timestep.ndim == 1:
        row = torch.arange(timestep.shape[0], device=timestep.device)
        return timestep, row.unsqueeze(1).expand(-1, tokens)
    values, row_BT = torch.unique(timestep, return_inverse=True)
    return values, row_BT


def unpatchify_channels_last(patches_BTP: Tensor, grid: Triple, patch_size: Triple) -> Tensor:
    """Latents [B, C, F, H, W] of tokens whose numbers run over (frame, row, column, channel), as in Wan's head."""
    time, rows, columns = grid
    split = torch.unflatten(torch.unflatten(patches_BTP, 2, (*patch_size, -1)), 1, grid)
    whole = split.permute(0, 7, 1, 4, 2, 5, 3, 6)
    pt, ph, pw = patch_size
    return whole.reshape(len(patches_BTP), -1, time * pt, rows * ph, columns * pw)
