"""What the frozen networks do when memory runs out: real allocation failures on the CPU, and every way back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan

from sora_train.codec.memory import is_out_of_memory
from sora_train.codec.text import load_text_encoder
from sora_train.codec.vae import BYTES_PER_PIXEL, Vae, load_vae

LIMITED = """
import resource, sys, torch
from sora_train.codec.vae import load_vae

torch.set_num_threads(1)
vae, clip = load_vae("builtin"), torch.arange(64 * 96 * 96 * 3).remainder(251).to(torch.uint8)
clip = clip.view(1, 64, 96, 96, 3)
expected = vae.encode(clip)
frames = vae.decode(expected[:, 0])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 128 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
vae.pixels_at_once = {"encode": 64 * 96 * 96, "decode": 64 * 96 * 96}
assert (vae.encode(clip) - expected).abs().max() < 1e-3
print(*vae.remarks, sep="\\n")
vae.remarks.clear()
assert (vae.decode(expected[:, 0]).int() - frames.int()).abs().max() <= 1
print(*vae.remarks, sep="\\n")
"""


def clips(batch: int, count: int, side: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


class Short:
    """Stands before a network's own function and has no memory for more than `room` items of `pixels` pixels each."""

    def __init__(self, function, room: int, pixels: int = sys.maxsize):
        self.function, self.room, self.pixels = function, room, pixels
        self.seen: list[int] = []

    def __call__(self, x: torch.Tensor, *args, **options):
        self.seen.append(len(x))
        if len(x) > self.room or x.shape[-1] * x.shape[-2] > self.pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.function(x, *args, **options)


def small(tmp_path: Path, **options) -> Vae:
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **options,
    ).save_pretrained(tmp_path)
    return load_vae(str(tmp_path))


def test_an_allocation_that_really_fails_is_halved_until_it_fits():
    # One thread: each further one takes address space of its own, which is what is limited. 64 frames take 151 MB in
    # one piece, a frame alone far less than the 128 MB there are: how much less depends on the processor's kernels.
    # glibc is to keep nothing for itself of what was freed before the limit: that would be more room, or less.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run([sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    remarks = done.stdout.splitlines()
    assert remarks[0] == "VAE: out of memory with 64 frames at once; goes on with 32"
    assert remarks.count(remarks[0]) == 2  # encoding and decoding each found out


def test_the_cpus_allocator_is_known_by_what_it_says():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("any"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_halved_batch_stays_halved_and_changes_nothing(tmp_path: Path):
    vae, x = small(tmp_path), clips(2, 10, 16)
    expected = vae.encode(x)
    vae.model.encode = Short(vae.model.encode, room=3)
    torch.testing.assert_close(vae.encode(x), expected, atol=1e-5, rtol=1e-5)
    assert vae.remarks == [
        "VAE: out of memory with 10 frames at once; goes on with 5",
        "VAE: out of memory with 5 frames at once; goes on with 2",
    ]
    assert vae.model.encode.seen == [10, 5, *(2,) * 10]


def test_decoding_takes_half_of_a_gpus_free_memory_and_encoding_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vae = small(tmp_path)
    latents = vae.encode(clips(1, 2, 16))
    before = dict(vae.pixels_at_once)
    frames = vae.decode(latents[:, 0])
    assert vae.pixels_at_once == before  # of a CPU
    large = load_vae(str(tmp_path))
    monkeypatch.setattr("sora_train.codec.vae.free_bytes", lambda device: 2**32)
    assert torch.equal(large.decode(latents[:, 0]), frames)
    assert large.pixels_at_once == before | {"decode": 2**32 // 2 // BYTES_PER_PIXEL}
    monkeypatch.setattr("sora_train.codec.vae.free_bytes", lambda device: 2**40)
    large.decode(latents[:, 0])  # keeps what it knows, which running out of memory may have lowered
    assert large.pixels_at_once["decode"] == 2**32 // 2 // BYTES_PER_PIXEL


def test_one_frame_that_does_not_fit_is_made_in_tiles(tmp_path: Path):
    vae, x = small(tmp_path, sample_size=16), clips(1, 2, 32)
    whole = vae.encode(x)
    vae.model.encoder.forward = Short(vae.model.encoder.forward, room=1, pixels=16 * 16)
    latents = vae.encode(x)
    assert latents.shape == whole.shape
    assert vae.remarks == [
        "VAE: out of memory with 2 frames at once; goes on with 1",
        "VAE: out of memory with one frame; goes on in tiles, whose seams are blended",
    ]
    assert torch.corrcoef(torch.stack((latents[:, 0].flatten(), whole[:, 0].flatten())))[0, 1] > 0.9


def test_one_clip_of_a_video_vae_that_does_not_fit_is_made_in_tiles(tmp_path: Path):
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1).save_pretrained(tmp_path)
    vae, x = load_vae(str(tmp_path)), clips(1, 5, 272)
    vae.model.encoder.forward = Short(vae.model.encoder.forward, room=1, pixels=256 * 256)
    assert vae.encode(x).shape == (1, 2, 2, 16, 34, 34)
    assert vae.remarks == ["VAE: out of memory with one clip; goes on in tiles, whose seams are blended"]


def test_where_not_even_tiles_fit_the_error_comes_out(tmp_path: Path):
    vae = small(tmp_path)
    vae.model.encode = Short(vae.model.encode, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        vae.encode(clips(1, 2, 16))
    assert vae.remarks[-1].endswith("in tiles, whose seams are blended")


def test_another_error_is_no_lack_of_memory(tmp_path: Path):
    vae = small(tmp_path)
    vae.model.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        vae.encode(clips(1, 2, 16))
    assert vae.remarks == []


def test_captions_at_once_are_halved_too():
    encoder = load_text_encoder("builtin", batch=8)
    captions = ["red " * n for n in range(12)]
    expected = encoder.encode(captions)
    encoder.one_by_one = False  # as on a GPU
    forward = encoder.model.forward
    short = Short(lambda x, mask: forward(input_ids=x, attention_mask=mask), room=3)
    encoder.model.forward = lambda input_ids, attention_mask: short(input_ids, attention_mask)  # pyright: ignore
    for a, b in zip(encoder.encode(captions), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert short.seen == [8, 4, *(2,) * 6]
    assert encoder.remarks == [
        "text: out of memory with 8 captions at once; goes on with 4",
        "text: out of memory with 4 captions at once; goes on with 2",
    ]
    short.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(captions)
