"""What ranks do with a model alone whose clips they share. `ranks.py` calls it as it calls `acts.py`."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sora_train.lora.config import LoraConfig
from sora_train.model import ModelConfig, Transformer, build
from sora_train.train.activation_checkpointing import apply_activation_checkpointing
from sora_train.train.adapted import adapt
from sora_train.train.sequence_parallel import make_sequence_group, share_clips
from sora_train.train.skipped_blocks import add_zero_gradients


def share(model: ModelConfig, out: Path, settings: dict, resume: str | None) -> None:
    """told.json: for each of `cases`, how far loss and gradient are from a rank's alone.

    A case is {"n": ranks that share, "clips": [[frames, caption tokens], …]} with, as needed, "mode" of checkpointing,
    "times" of each frame, "dtype", "lora".
    """
    told = []
    for case in settings["cases"]:
        alone, shared = (alive(model, case.get("lora", {}), case.get("dtype", "float32")) for _ in range(2))
        share_clips(shared, make_sequence_group(model, case["n"]))
        apply_activation_checkpointing(shared, case.get("mode", "none"))
        (loss, gradient), (loss_shared, gradient_shared) = (learn(each, case) for each in (alone, shared))
        dist.all_reduce(gradient_shared)
        gradient_shared *= case["n"] / dist.get_world_size()
        apart = float((gradient_shared - gradient).norm() / gradient.norm())
        told.append([abs(loss_shared / loss - 1), apart])
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "told.json").write_text(json.dumps(told))


def alive(config: ModelConfig, lora: dict[str, Any], dtype: str) -> Transformer:
    """A model, or its adapters, without zeros."""
    torch.manual_seed(0)
    model = build(config)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    if lora:
        adapt(model, LoraConfig(**lora), half=False)
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.data.normal_(std=0.1)
    add_zero_gradients(model)
    return model.to(getattr(torch, dtype))


def learn(model: Transformer, case: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """The sum of losses of clips of noise of 3 x 5 places, and its gradient."""
    total, draw = 0.0, torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for f, tokens in case["clips"]:
        x = torch.randn(2, f, model.config.in_channels, 6, 10, generator=draw)
        t = 1000 * torch.rand((2, f) if case.get("times") else (2,), generator=draw)
        text = torch.randn(2, tokens, model.config.text_width, generator=draw)
        mask = torch.arange(tokens) < torch.tensor([[tokens], [1]])
        loss = (model(x.to(dtype), t, text.to(dtype), mask).float() - x).square().mean()
        loss.backward()
        total += loss.item()
    trained = [p for p in model.parameters() if p.requires_grad]
    return total, torch.cat([p.grad.float().flatten() for p in trained if p.grad is not None])
