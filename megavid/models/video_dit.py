"""The video diffusion transformer as one pipeline chunk: the blocks it holds, and at the ends the patches and the head.

Owns the order of things from patches to velocity. A chunk that is neither first nor last has only blocks and the
replicated embedders. A rank is given its context-parallel span of every pack's tokens (T below); they travel as
[t, B, D], and between tensor-parallel blocks a rank holds T / tp of them where sequence parallelism is on.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megavid.config.schema import RunConfig
from megavid.models.attention import Attend, Prompts
from megavid.models.block import Block, Conditioning
from megavid.models.build import Build
from megavid.models.capture import Capture, check_capture
from megavid.models.embedders import Head, ImageEmbedder, PatchEmbedder, TextEmbedder, TimestepEmbedder
from megavid.models.fp8 import scalings_of
from megavid.models.inputs import ModelInput
from megavid.models.lora import freeze_base
from megavid.models.moe.stats import RoutingStats
from megavid.models.moe.tokens import TokenInfo, noise_bucket
from megavid.models.te import check_usable
from megavid.models.transformer import transformer_config
from megavid.ops.block_attention_fp8 import has_fp8_forward
from megavid.ops.block_attention_library import block_attention
from megavid.ops.choose import block_ops
from megavid.ops.packs import clip_index, positions
from megavid.ops.regions import in_region, region
from megavid.ops.rope import place_code, rope_angles
from megavid.parallel import mcore
from megavid.parallel.context.attention import ContextParallelAttention
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layers_of_chunk


class VideoTransformer(mcore.MegatronModule):  # type: ignore[misc]  # megatron-core has no type stubs
    """One pipeline chunk of the model.

    The attributes that megatron-core's schedules read are ``model_type``, ``pre_process``, ``post_process``,
    ``vp_stage``, ``share_embeddings_and_output_weights`` and ``set_input_tensor``.
    """

    def __init__(self, build: Build, layers: range, recompute: str, vp_stage: int | None) -> None:
        super().__init__(build.transformer)
        model, mesh = build.model, build.mesh
        chunk = vp_stage or 0
        self.model, self.mesh = model, mesh
        self.pre_process = mesh.is_first_stage and chunk == 0
        self.post_process = mesh.is_last_stage and chunk == mesh.layout.vpp - 1
        self.vp_stage = vp_stage
        self.model_type = mcore.ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.received: Tensor | None = None
        self.attention_backend, self.capture = build.attention_backend, build.capture

        self.timestep_embedder = TimestepEmbedder(build)
        self.text_embedder = TextEmbedder(build)
        if model.image_size:
            self.image_embedder = ImageEmbedder(build)
        if self.pre_process:
            self.patch_embedder = PatchEmbedder(build)
        self.blocks = nn.ModuleList([Block(build, layer, recompute) for layer in layers])
        if self.post_process:
            self.head = Head(build)
        self.routing: dict[int, RoutingStats] = {}

    @property
    def _blocks(self) -> Iterator[Block]:
        return (block for block in self.blocks if isinstance(block, Block))

    def set_input_tensor(self, tensor: Any) -> None:
        """Take the hidden states that the pipeline received from the chunk before."""
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, inputs: ModelInput, aux_scale: float = 0.0, loss_scale: float = 1.0) -> Tensor:
        """Velocity of the patches given on the last chunk, [B, T, P] fp32 on every tensor-parallel rank; else hidden
        states.

        Args:
            inputs: noised packs and what they are conditioned on, the same on every stage: this rank's span of them.
            aux_scale: weight of one clip's router losses, 1 / clips of the global batch; 0 leaves them out.
            loss_scale: what the backward pass multiplies every loss by, ``Engine.loss_scale``.
        """
        with region("token_index"):
            row_tB = self._own_tokens(inputs.row_BT.t())
        head_RD, modulation_R6D = self.timestep_embedder(inputs.timestep_R)
        tokens = self._token_info(inputs, row_tB, aux_scale, loss_scale)
        given = self._conditioning(inputs, modulation_R6D, row_tB, tokens)
        if self.pre_process:
            x_tBD = self._embed_patches(inputs)
        else:
            assert self.received is not None
            x_tBD = self.received
        for block in self._blocks:
            x_tBD, stats = block(x_tBD, given)
            if stats is not None:
                self._keep(block.layer, stats)
        return self._velocity(x_tBD, head_RD, row_tB) if self.post_process else x_tBD

    @in_region("embedders")
    def _embed_patches(self, inputs: ModelInput) -> Tensor:
        x_tBD: Tensor = self.patch_embedder(self._own_tokens(inputs.patches_BTP.transpose(0, 1)))
        if not self.model.absolute_positions:
            return x_tBD
        place_TB3 = self._places(inputs, x_tBD.device)
        return x_tBD + self._own_tokens(place_code(place_TB3, self.model.hidden_size)).to(x_tBD.dtype)

    @in_region("head")
    def _velocity(self, x_tBD: Tensor, head_RD: Tensor, row_tB: Tensor) -> Tensor:
        velocity_tBP: Tensor = self.head(x_tBD, head_RD, row_tB)
        if self.mesh.is_sequence_parallel:
            # Every rank computes the same loss from all tokens, so its gradient is taken once, not summed.
            velocity_tBP = mcore.gather_from_sequence_parallel_region(
                velocity_tBP, tensor_parallel_output_grad=False, group=self.mesh.group("tp")
            )
        velocity = velocity_tBP.transpose(0, 1)
        return velocity if velocity.dtype == torch.float64 else velocity.float()

    def training_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Routers' bias, which training updates without a gradient, by names in model space."""
        for block in self._blocks:
            if block.is_moe and block.feed_forward.router.expert_bias is not None:
                yield f"blocks.{block.layer}.moe.router.expert_bias", block.feed_forward.router.expert_bias

    def fp8_histories(self) -> Iterator[tuple[str, Tensor]]:
        """What delayed scaling has seen of each layer, by the name of its first matrix."""
        return ((s.name, s.history) for s in scalings_of([self]) if s.recipe.name == "delayed")

    def take_routing(self) -> dict[int, RoutingStats]:
        """Routing statistics of each expert layer since the last call, summed over microbatches."""
        routing, self.routing = self.routing, {}
        return routing

    @in_region("routing_statistics")
    def _keep(self, layer: int, stats: RoutingStats) -> None:
        detached = RoutingStats(*(value.detach() for value in stats))
        before = self.routing.get(layer)
        self.routing[layer] = detached if before is None else RoutingStats(*(a + b for a, b in zip(before, detached)))

    def _own_tokens(self, x_TBx: Tensor) -> Tensor:
        """This tensor-parallel rank's tokens of a tensor that has all of the span."""
        if not self.mesh.is_sequence_parallel:
            return x_TBx
        return x_TBx.chunk(self.mesh.size("tp"))[self.mesh.coordinate("tp")]

    def _places(self, inputs: ModelInput, device: torch.device) -> Tensor:
        place_BT3 = positions(inputs.packs, self.model.latent_frame_rate, inputs.span)
        return place_BT3.to(device).transpose(0, 1)

    @in_region("attention_plan")
    def _attention(self, inputs: ModelInput) -> Attend:
        """Attention of every clip of these packs to itself, the same object for all blocks: it is planned once."""
        layout = self.mesh.cp_layout(inputs.packs[0].tokens)
        assert inputs.span == layout.span, (inputs.span, layout.span)
        attention = ContextParallelAttention(layout, layout.groups.plan.kind, self.attention_backend)
        return partial(attention, plans=tuple(AttnPlan.packed(pack) for pack in inputs.packs))

    @in_region("token_index")
    def _token_info(self, inputs: ModelInput, row_tB: Tensor, aux_scale: float, loss_scale: float) -> TokenInfo:
        clip_tB = self._own_tokens(clip_index(inputs.packs, inputs.span).to(row_tB.device).t())
        lengths = [clip.tokens for pack in inputs.packs for clip in pack.clips]
        own = self.mesh.coordinate("tp") if self.mesh.is_sequence_parallel else 0
        return TokenInfo(
            clip_T=clip_tB.reshape(-1),
            bucket_T=noise_bucket(inputs.timestep_R / 1000.0)[row_tB.reshape(-1)],
            num_clips=len(lengths),
            tokens_of_clip_G=torch.tensor(lengths, device=row_tB.device),
            aux_scale=aux_scale,
            loss_scale=loss_scale,
            draw_B=tuple(pack.clips[0].draw if pack.clips else -1 for pack in inputs.packs),
            first_token=inputs.span.start + own * len(clip_tB),
        )

    def _prompts(self, inputs: ModelInput) -> Prompts:
        """Captions and images at the model's width."""
        text_LGD = self.text_embedder(inputs.text_GLD)
        if not self.model.image_size:
            return Prompts(text_LGD)
        assert inputs.image_GLI is not None, "a model with an image branch is given image features"
        return Prompts(text_LGD, self.image_embedder(inputs.image_GLI), inputs.has_image_G)

    def _conditioning(
        self, inputs: ModelInput, modulation_R6D: Tensor, row_tB: Tensor, tokens: TokenInfo
    ) -> Conditioning:
        model, device = self.model, modulation_R6D.device
        wide_dtype = torch.float64 if modulation_R6D.dtype == torch.float64 else torch.float32
        with region("rotary"):
            angles = rope_angles(self._places(inputs, device), model.head_size).unsqueeze(2)
            cos, sin = angles.cos().to(wide_dtype), angles.sin().to(wide_dtype)
        return Conditioning(
            packs=inputs.packs,
            span=inputs.span,
            attend=self._attention(inputs),
            modulation_R6D=self.capture.filled_up(modulation_R6D),
            row_tB=row_tB,
            prompts=self._prompts(inputs),
            cos=cos,
            sin=sin,
            tokens=tokens,
        )


def build_chunks(config: RunConfig, mesh: Mesh) -> list[VideoTransformer]:
    """The chunks of the model that this rank holds, with no values in their parameters yet.

    Raises:
        ConfigError: the attention kernel cannot take this device, dtype or head width, or compiled ops are asked for
            that are not there, Transformer Engine's linears, or a compiler, where it lacks something.
    """
    layout, backend = mesh.layout, config.parallel.attention_backend
    check_usable(config.precision, mesh.device.type)
    transformer = transformer_config(config, layout, mesh.device)
    # Asked here, before memory is used.
    kernel = block_attention(backend, mesh.device, transformer.params_dtype, config.model.head_size)
    if config.precision.fp8_attention:
        has_fp8_forward(kernel, mesh.device, config.model.head_size)  # tried now, while there is memory
    ops = block_ops(config.train.ops, mesh.device, transformer.params_dtype)
    check_capture(config.train.capture, mesh.device)
    capture = Capture(config.train.capture, ops)
    chunks = []
    for vpp_rank in range(layout.vpp):
        build = Build(
            model=config.model,
            transformer=transformer,
            mesh=mesh,
            is_first_chunk=mesh.is_first_stage and vpp_rank == 0,
            attention_backend=backend,
            ops=ops,
            capture=capture,
            lora=config.lora,
            precision=config.precision,
        )
        layers = layers_of_chunk(config.model, layout, mesh.coordinate("pp"), vpp_rank)
        vp_stage = vpp_rank if layout.vpp > 1 else None
        chunks.append(VideoTransformer(build, layers, config.parallel.recompute, vp_stage))
        if config.lora.rank:
            freeze_base(chunks[-1])
    return chunks
