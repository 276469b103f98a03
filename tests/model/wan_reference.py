"""Small models of diffusers' `WanTransformer3DModel`, a second implementation of Wan, with random weights."""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

TEXT_WIDTH = 20
WAN_2_1 = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 3, "attention_head_dim": 24, "ffn_dim": 100}
WAN_2_2 = {"in_channels": 48, "out_channels": 48, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 256}
KINDS = {"2.1": WAN_2_1, "2.2": WAN_2_2}


def reference(kind: str = "2.1", num_layers: int = 2) -> WanTransformer3DModel:
    """A small model of the released configuration, every weight random (its own zeros would hide mistakes)."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**KINDS[kind], text_dim=TEXT_WIDTH, num_layers=num_layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.eval()


def opened(folder: Path) -> WanTransformer3DModel:
    """The model in a folder, as `from_pretrained` opens it where `accelerate` is installed, which Wan needs there."""
    model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    model.load_state_dict(weights)
    return model.eval()


def inputs(kind: str, f: int, h: int, w: int, lengths: tuple[int, ...] = (7, 3)) -> tuple[torch.Tensor, ...]:
    """Latents, text of captions of these lengths, and its mask. Padding holds numbers that must not matter."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), f, KINDS[kind]["in_channels"], h, w, generator=g)
    text = torch.randn(len(lengths), max(lengths), TEXT_WIDTH, generator=g)
    return x, text, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def padded(text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Text as `WanPipeline` gives it: cut to its true length, then zeros up to 512 tokens."""
    whole = [torch.cat([each[real], each.new_zeros(512 - int(real.sum()), each.shape[1])])
             for each, real in zip(text, mask, strict=True)]  # fmt: skip
    return torch.stack(whole)


def run_reference(model: WanTransformer3DModel, x, t, text, mask) -> torch.Tensor:
    """Its output `b f c h w`. Times of frames become times of tokens, as in `WanPipeline` with expand_timesteps."""
    if t.ndim == 2:
        t = t.repeat_interleave(x.shape[3] // 2 * (x.shape[4] // 2), dim=1)
    return model(x.transpose(1, 2), t, padded(text, mask), return_dict=False)[0].transpose(1, 2)
