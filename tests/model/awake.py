"""Small models without zero weights: the zeros that training starts with would hide mistakes."""

import torch

from sora_train.model import ModelConfig, Transformer, build


def awake(config: ModelConfig) -> Transformer:
    """A model whose weights are all random."""
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def nudged(config: ModelConfig, by: float = 0.05) -> Transformer:
    """A model of which every weight is near its first value."""
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model
