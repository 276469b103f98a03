"""The numerics of the model on a device: bf16 against float32, and our model against diffusers'."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from sora_train.model.convert import from_diffusers, to_diffusers
from sora_train.train.fp8 import use_fp8
from tests.gpu.setting import apart, size_of
from tests.model.awake import nudged


def numerics(device: torch.device, out: Path) -> str:
    """Outputs and gradients in float32 are those of diffusers' model; in bf16 they are as near to them as its own."""
    torch.backends.cudnn.allow_tf32 = False  # diffusers' patches are a convolution
    size = size_of(device)
    draw = torch.Generator().manual_seed(0)
    batch = (
        torch.randn(2, size.frames, 4, size.side, size.side, generator=draw),
        torch.tensor([100.0, 700.0]),
        torch.randn(2, size.tokens, size.model.text_width, generator=draw),
        torch.arange(size.tokens) < torch.tensor([[size.tokens // 3], [size.tokens]]),
    )
    model = nudged(size.model, 0.02)
    to_diffusers(model, out / "weights", frames=size.frames)
    said = []

    def ours(dtype: torch.dtype) -> dict[str, Tensor]:
        return results(from_diffusers(out / "weights"), batch, device, dtype, out / "gradients")

    def theirs(dtype: torch.dtype) -> dict[str, Tensor]:
        model = LatteTransformer3DModel.from_pretrained(out / "weights", low_cpu_mem_usage=False)
        return results(model, batch, device, dtype)

    exact, half = theirs(torch.float32), theirs(torch.bfloat16)
    found, found_half = ours(torch.float32), ours(torch.bfloat16)
    said.append(compare("ours, float32", found, exact, 1e-4, 1e-3))
    said.append(compare("diffusers, bf16", half, exact, 0.1, 0.2))
    said.append(compare("ours, bf16", found_half, exact, 0.1, 0.2))
    joint = replace(size.model, attention="joint", positions="rotary", pooled_text=True)
    runs = [results(nudged(joint, 0.02), batch, device, dtype) for dtype in (torch.bfloat16, torch.float32)]
    said.append(compare("joint with rotary positions, bf16", *runs, 0.1, 0.2))
    eighth = nudged(size.model, 0.02)
    use_fp8(eighth, device)
    said.append(
        compare("ours, fp8", results(eighth, batch, device, torch.bfloat16, out / "gradients"), exact, 0.2, 0.4)
    )
    return "errors of outputs and of gradients: " + "; ".join(said)


def results(model: Any, batch: Any, device: torch.device, dtype: torch.dtype, folder: Path | None = None) -> dict:
    """The output, and the gradients of its mean square. `folder`: those of our model by diffusers' names."""
    model = model.to(device, dtype).train()
    x, t, text, mask = (tensor.to(device) for tensor in batch)
    x, text = x.to(dtype), text.to(dtype)
    if isinstance(model, LatteTransformer3DModel):
        bias = torch.where(mask, 0.0, -10000.0).to(dtype)[:, None].repeat_interleave(x.shape[1], dim=0)
        y = model(x.transpose(1, 2), t, text, bias, return_dict=False)[0].transpose(1, 2)
    else:
        y = model(x, t, text, mask)
    y.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if folder is not None:  # renaming is linear
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        to_diffusers(model.cpu(), folder, frames=x.shape[1])
        gradients = load_file(folder / "diffusion_pytorch_model.safetensors")
    return {"output": y.detach().float().cpu(), **{name: g.float().cpu() for name, g in gradients.items()}}


def compare(what: str, found: dict[str, Tensor], exact: dict[str, Tensor], output: float, gradient: float) -> str:
    """Relative errors of the output and of all gradients together; AssertionError if one is over its bound."""
    names = [name for name in exact if name != "output"]
    missing = [name for name in names if name not in found]
    assert not missing, f"{what}: no gradient of {missing[:3]}"
    errors = (
        apart(found["output"], exact["output"]),
        apart(*(torch.cat([each[name].flatten() for name in names]) for each in (found, exact))),
    )
    for kind, error, bound in zip(("output", "gradients"), errors, (output, gradient), strict=True):
        assert error < bound, f"{what}: {kind} off by {error:.1e}, more than {bound:g}"
    return f"{what} {errors[0]:.1e}, {errors[1]:.1e}"
