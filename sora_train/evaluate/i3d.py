"""The forward pass of I3D, for weights in safetensors.

I3D (Carreira and Zisserman 2017, arXiv 1705.07750, section 2.4 and figure 3) is Inception-v1 with filters inflated
along time, trained to classify the 400 actions of Kinetics.

FVD (Unterthiner et al. 2018, arXiv 1812.01717) compares its logits. The authors' code takes the 400 values before the
softmax of tfhub's `deepmind/i3d-kinetics-400/1`, averaged over time. StyleGAN-V's code, which Latte copied, takes the
same logits but resizes frames differently (see `resized`), so its values are not comparable.

As in TensorFlow, "SAME" padding puts an odd zero at the end. Batch norm (no scale, epsilon 0.001) follows each
convolution except the last. It is folded into the weights when they are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sora_train.errors import UserError
from sora_train.recipe import I3D_FRAMES

LOGITS, SIZE = 400, 224
EPSILON = 1e-3
STEM = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
"""Input channels, output channels and filter side of each convolution."""
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Output channels of an Inception block's convolutions, branch by branch.
The branches are: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after a max pool."""
POOL_BEFORE = {"Mixed_4b": (3, 2), "Mixed_5b": (2, 2)}
"""Side and stride of the max pool (over time too) before a block."""
LAST = "Logits.Conv3d_0c_1x1"

Convolution = tuple[Tensor, Tensor]


class I3D:
    """The network on a device. `hash` is the SHA-256 of its weights file."""

    def __init__(self, convolutions: dict[str, Convolution], digest: str):
        self.convolutions, self.hash = convolutions, digest
        self.device = convolutions[LAST][0].device

    @torch.inference_mode()
    def __call__(self, videos: UInt8[Tensor, "b F H W 3"]) -> Float[Tensor, "b 400"]:
        """Computes the logits of each video, on the network's device.

        Raises UserError for fewer than 16 frames.
        """
        if videos.shape[1] < I3D_FRAMES:
            raise UserError(
                f"I3D needs videos of at least {I3D_FRAMES} frames, these have {videos.shape[1]}: FVD can be had of "
                f"runs with data.frames {I3D_FRAMES} or more",
                code="unsupported",
            )
        x = rearrange(videos.to(self.device), "b F H W c -> b c F H W").float()
        x = 2 * resized(x, SIZE) / 255 - 1
        x = self._unit(x, "Conv3d_1a_7x7", stride=2)
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        x = self._unit(self._unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        for block in MIXED:
            if block in POOL_BEFORE:
                side, stride = POOL_BEFORE[block]
                x = max_pool(x, (side, side, side), (stride, stride, stride))
            x = self._mixed(x, block)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return F.conv3d(x, *self.convolutions[LAST]).mean(dim=(2, 3, 4))

    def _unit(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self.convolutions[name]
        side = weight.shape[-1]
        return F.relu_(F.conv3d(same(x, (side, side, side), (stride, stride, stride)), weight, bias, stride))

    def _mixed(self, x: Tensor, block: str) -> Tensor:
        a, b, c, d = (f"{block}.Branch_{i}.Conv3d" for i in range(4))
        return torch.cat(
            [
                self._unit(x, f"{a}_0a_1x1"),
                self._unit(self._unit(x, f"{b}_0a_1x1"), f"{b}_0b_3x3"),
                self._unit(self._unit(x, f"{c}_0a_1x1"), f"{c}_0b_3x3"),
                self._unit(max_pool(x, (3, 3, 3), (1, 1, 1)), f"{d}_0b_1x1"),
            ],
            dim=1,
        )


def same(x: Tensor, side: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """SAME padding: pads the last three axes with zeros.

    A window of this side and stride then has ceil(n / stride) positions.
    """
    pads: list[int] = []
    for n, k, s in reversed(list(zip(x.shape[2:], side, stride, strict=True))):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


def max_pool(x: Tensor, side: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Max pool with SAME padding.

    Padding with zeros is correct because the input comes from a ReLU and is never negative.
    """
    return F.max_pool3d(same(x, side, stride), side, stride)


def resized(x: Float[Tensor, "b c F H W"], size: int) -> Float[Tensor, "b c F size size"]:
    """Resizes frames to `size` x `size`, bilinear without antialiasing.

    Pixel i is read at i n / size, as in FVD's own code (TensorFlow 1's `resize_bilinear`). PyTorch reads at
    (i + 1/2) n / size - 1/2. The aspect ratio is not preserved.
    """
    for axis in (3, 4):
        n = x.shape[axis]
        place = torch.arange(size, device=x.device) * (n / size)
        low = place.long().clamp(max=n - 1)
        part = (place - low).view(-1, 1) if axis == 3 else place - low
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=n - 1)), part)
    return x


def shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the weights file."""
    convolutions = dict(STEM)
    channels = 192
    for block, (a, b0, b1, c0, c1, d) in MIXED.items():
        convolutions |= {
            f"{block}.Branch_0.Conv3d_0a_1x1": (channels, a, 1),
            f"{block}.Branch_1.Conv3d_0a_1x1": (channels, b0, 1),
            f"{block}.Branch_1.Conv3d_0b_3x3": (b0, b1, 3),
            f"{block}.Branch_2.Conv3d_0a_1x1": (channels, c0, 1),
            f"{block}.Branch_2.Conv3d_0b_3x3": (c0, c1, 3),
            f"{block}.Branch_3.Conv3d_0b_1x1": (channels, d, 1),
        }
        channels = a + b1 + c1 + d
    found = {f"{name}.conv.weight": (c_out, c_in, k, k, k) for name, (c_in, c_out, k) in convolutions.items()}
    for name, (_, c_out, _) in convolutions.items():
        found |= {f"{name}.bn.{part}": (c_out,) for part in ("bias", "mean", "var")}
    return found | {f"{LAST}.conv.weight": (LOGITS, channels, 1, 1, 1), f"{LAST}.conv.bias": (LOGITS,)}


def load_i3d(path: str | Path, device: str | torch.device = "cpu", key: str = "validation.i3d") -> I3D:
    """Loads I3D from a safetensors file; error messages call the setting `key`.

    Raises UserError if the file is missing or does not hold I3D.
    """
    place = Path(path).expanduser()
    try:
        content = place.read_bytes()
        weights = load(content)
    except OSError as error:
        raise UserError(
            f"{key}: {place} can't be read ({error.strerror}); name I3D's safetensors", code="weights"
        ) from None
    except SafetensorError as error:
        raise UserError(
            f"{key}: {place} is cut short or no safetensors ({error}); nothing else is loaded, since a pickle "
            "could run anything",
            code="weights",
        ) from None
    for name, shape in shapes().items():
        if name not in weights or tuple(weights[name].shape) != shape:
            found = f"{tuple(weights[name].shape)}" if name in weights else "missing"
            raise UserError(
                f"{key}: {place} is not I3D with {LOGITS} logits: {name} should be {shape} and is {found}",
                code="weights",
            )
    convolutions: dict[str, Convolution] = {LAST: (weights[f"{LAST}.conv.weight"], weights[f"{LAST}.conv.bias"])}
    for name in {key.removesuffix(".conv.weight") for key in weights if key.endswith(".conv.weight")} - {LAST}:
        weight, bias, mean, var = (weights[f"{name}.{key}"] for key in ("conv.weight", "bn.bias", "bn.mean", "bn.var"))
        scale = torch.rsqrt(var + EPSILON)
        convolutions[name] = weight * scale.view(-1, 1, 1, 1, 1), bias - mean * scale
    made = {name: (weight.float().to(device), bias.float().to(device)) for name, (weight, bias) in convolutions.items()}
    return I3D(made, hashlib.sha256(content).hexdigest())


def features(i3d: I3D, videos: Iterable[np.ndarray]) -> Float[np.ndarray, "n 400"]:
    """Computes the float64 logits of uint8 videos `F H W 3`.

    Videos are processed one at a time, so memory holds only one.
    """
    rows = [i3d(torch.from_numpy(video)[None])[0].cpu().double().numpy() for video in videos]
    return np.stack(rows)
