"""A pipeline of diffusers small enough to run in a second: its own classes with random weights, saved to a folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from megavid.checkpoint.convert import open_model, write_model
from megavid.config.schema import ModelConfig
from megavid.data.text import Umt5Encoder, spec_of
from megavid.data.tokenizer import WanVaeTokenizer
from megavid.inference import MegavidTransformer3DModel
from megavid.training.kit import ClipSize, SamplingKit

WORDS = ("a", "red", "blue", "ball", "moves", "left", "right", "ugly")
CHANNELS, TEXT_WIDTH, TEXT_LENGTH, IMAGE_WIDTH = 4, 16, 12, 24
SIZE = ClipSize(frames=5, height=32, width=48, frame_rate=16.0)
SHIFT = 3.0


def tokenizer() -> Any:
    """One token a word and one at the end."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def save_base(folder: Path) -> None:
    """VAE, text encoder, tokenizer and scheduler of a pipeline that has no transformer yet."""
    torch.manual_seed(11)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.3, 0.7],
    )  # fmt: skip
    text = UMT5Config(
        vocab_size=3 + len(WORDS), d_model=TEXT_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
    ).save_pretrained(folder)


def save_image_encoder(folder: Path) -> None:
    """Give the pipeline in ``folder`` a CLIP vision model that sees 257 tokens of a picture, as Wan 2.1's does."""
    torch.manual_seed(12)
    shape = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=2,
    )  # fmt: skip
    CLIPVisionModel(shape).eval().save_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "image_processor")
    file = folder / "model_index.json"
    parts = {"image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessor"}
    named = {name: ["transformers", kind] for name, kind in parts.items()}
    file.write_text(json.dumps({**json.loads(file.read_text()), **named}))


def save_transformer(folder: Path, model: ModelConfig, seed: int = 0) -> None:
    """A transformer with random weights, as megavid.inference saves it."""
    torch.manual_seed(seed)
    made = MegavidTransformer3DModel.of_model(model)
    for name, tensor in made.state_dict().items():
        tensor.add_((0.3 if "router" in name else 0.05) * torch.randn_like(tensor))
    made.save_pretrained(folder)


def save_checkpoint(folder: Path, transformer: Path, base: Path) -> None:
    """A training checkpoint of the same weights, which names the pipeline's VAE and text encoder as its own."""
    encoder = Umt5Encoder(base / "text_encoder", TEXT_LENGTH)
    text = spec_of(encoder, str(base / "text_encoder"))
    kit = SamplingKit(WanVaeTokenizer(base / "vae").spec, encoder, text, SIZE)
    source = open_model(transformer)
    run = replace(source.run, diffusion=replace(source.run.diffusion, flow_shift=SHIFT))
    write_model(replace(source, run=run, files=kit.files()), folder, to="megavid")
