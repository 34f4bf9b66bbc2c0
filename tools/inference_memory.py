"""Memory that the weights of a served model take: python tools/inference_memory.py

Prints a table for docs/inference.md. Nothing is estimated: each model is built without memory (on torch's meta device)
and its tensors are added up in the dtypes that loading gives them.
"""

import torch
from torch import nn

from megavid.config.load import load_run
from megavid.inference import MegavidTransformer3DModel

PRESETS = ("wan_1b", "wan_14b", "wan_moe_7b_a2b", "wan_moe_30b_a3b", "wan_moe_100b_a20b")
RANKS = (1, 8)
KEPT = MegavidTransformer3DModel._keep_in_fp32_modules


def gib(model: nn.Module, matrix_bytes: int, ranks: int) -> float:
    """GiB of a model's weights on each of ``ranks`` expert-parallel ranks."""
    total = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            size = tensor.element_size()
        else:
            size = 4 if any(part in name.split(".") for part in KEPT) else matrix_bytes
        share = ranks if ".ffn.experts." in name else 1
        total += tensor.numel() * size // share
    return total / 2**30


def row(preset: str) -> str:
    """A line of the table."""
    with torch.device("meta"):
        model = MegavidTransformer3DModel.of_model(load_run(preset, []).model)
    count = sum(parameter.numel() for parameter in model.parameters())
    is_moe = model.shape.family == "wan_moe"
    cells = [gib(model, 4, 1)] + [gib(model, 2, ranks) for ranks in RANKS if ranks == 1 or is_moe]
    model.quantize_fp8_()
    cells += [gib(model, 2, ranks) for ranks in RANKS if ranks == 1 or is_moe]
    texts = [f"{cell:.1f}" for cell in cells]
    if not is_moe:
        texts = [texts[0], texts[1], "-", texts[2], "-"]
    return f"| `{preset}` | {count / 1e9:.2f} B | " + " | ".join(texts) + " |"


def main() -> None:
    """Print the table."""
    print("| preset | parameters | fp32 | bf16 | bf16, 8 expert ranks | FP8 | FP8, 8 expert ranks |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for preset in PRESETS:
        print(row(preset), flush=True)


if __name__ == "__main__":
    main()
