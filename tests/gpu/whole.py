"""The parts of the GPU check that run commands, and the stages of prep."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from data_prep.ray_pipeline import vae_batch_size
from data_prep.schemas import DECODED
from data_prep.stages import EmbedText, EncodeVideo
from sora_train.codec import BUILTIN, CodecConfig
from sora_train.recipe import Recipe
from sora_train.sample import generate, load_run
from sora_train.settings import read_yaml
from tests.gpu.setting import apart

ROOT = Path(__file__).parents[2]


def road(device: torch.device, out: Path) -> str:
    """`sora prep`, `sora train` and samples through Ray; samples in the run's precision against float32."""
    from sora_train.quickstart.shapes import make_clips

    make_clips(out / "clips", 12)
    recipe = out / "job.yaml"
    recipe.write_text(
        f"""\
name: road
data: {{captions: {out}/clips/captions.csv, output: {out}/shards, frames: 8, fps: 8, height: 64, width: 64}}
model: {{width: 64, depth: 2, heads: 2, text_width: 64, sample_size: 8}}
train: {{output: {out}/runs, steps: 3, batch_size: 4, micro_batch_size: 2, log_every: 1, precision: bf16}}
validation: {{every: 0}}
cluster: {{address: local, workers: 1, gpu: {"yes" if device.type == "cuda" else "no"}}}
""".replace("gpu: yes", "gpu: 'yes'").replace("gpu: no", "gpu: 'no'")
    )
    sora("prep", recipe)
    sora("train", recipe, "--no-preflight")
    folder = out / "runs/road"
    run_ = load_run(folder, device)
    half = torch.from_numpy(generate(run_, ["a red circle moving up"] * 2, [0, 1]))
    settings = next((folder / "checkpoints").glob("step_00000003")) / "recipe.yaml"
    assert read_yaml(settings)["train"]["precision"] == "bf16"
    settings.write_text(settings.read_text().replace("precision: bf16", "precision: fp32"))
    exact = torch.from_numpy(generate(load_run(folder, device), ["a red circle moving up"] * 2, [0, 1]))
    off = apart(half, exact)
    assert off < 0.1, f"frames sampled in bf16 differ by {off:.2f} of float32's"
    return f"prep, train, sample; frames in the run's precision within {off:.1e} of float32's"


def sora(verb: str, *words: object) -> None:
    """A command as people type it; AssertionError with its last lines where it fails."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "RAY_ADDRESS": "", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "sora_train.cli", verb, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"sora {verb}: exit {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}"


def gpu_tests(device: torch.device, out: Path) -> str:
    """The other tests that need a GPU."""
    where = ["tests", "--ignore", "tests/gpu"] if device.type == "cuda" else ["tests/bench"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 5), f"{done.stdout[-2000:]}{done.stderr[-500:]}"  # 5: there is none
    return done.stdout.strip().splitlines()[-1].strip("= ")


def prepared(device: torch.device, out: Path) -> str:
    """Clips per second of prep's stages: Stable Diffusion's VAE, and a part of T5-XXL, both with random weights."""
    cuda = device.type == "cuda"
    frames, side = (16, 256) if cuda else (2, 32)
    make_networks(out, device)
    codec = CodecConfig(vae=str(out / "vae"), text=str(out / "text"), precision="bf16", caption_cleaning="none")
    recipe = Recipe.model_validate({"data": {"frames": frames, "height": side, "width": side}})
    batch, bucket = min(vae_batch_size(recipe, gpus=float(cuda)), 64 if cuda else 4), f"{frames}x{side}x{side}"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, frames, side, side, 3), np.uint8)
    rows = [decoded(f"{i:04x}", bucket, clip.tobytes()) for i, clip in enumerate(pixels)]
    clips, encode = pa.Table.from_pylist(rows, DECODED), EncodeVideo(codec, 1, device.type)

    def rate(act) -> float:
        act()
        times = []
        for _ in range(3):
            began = time.monotonic()
            act()
            times.append(time.monotonic() - began)
        return batch / statistics.median(times)

    frames_of = torch.from_numpy(pixels)
    bare, stage = rate(lambda: encode.vae.encode(frames_of)), rate(lambda: encode(clips))
    latents = encode(clips)
    assert not any(latents["reason"].to_pylist()), latents["message"].to_pylist()[0]
    remarks = [note for note in latents["note"].to_pylist() if note]
    del encode
    shape = (2, frames, 4, side // 8, side // 8)
    embed = EmbedText(codec, {bucket: shape}, 32, 1, device.type)

    def embed_again() -> None:
        embed.cache.clear()
        made = embed(latents)
        assert not any(made["reason"].to_pylist()), made["message"].to_pylist()[0]

    text = rate(embed_again)
    return (
        f"VAE stage {stage:.1f} clips/s of {bucket} in batches of {batch} ({stage / bare:.2f} of the VAE alone, "
        f"{bare:.1f}), text stage {text:.1f} captions/s of 120 tokens with 6 of T5-XXL's 24 layers"
        + (f"; {'; '.join(remarks)}" if remarks else "")
    )


def decoded(name: str, bucket: str, frames: bytes) -> dict:
    """A row as Decode makes it, with a caption of its own."""
    known = {"row_id": name, "source": f"{name}.mp4", "source_size": 1, "source_version": "1", "sample_id": name}
    times = {"start_s": 0.0, "end_s": 1.0, "content_hash": name, "perceptual_hash": ""}
    empty = {"reason": "", "message": "", "remark": "", "note": "", "asked": []}
    caption = f"{name} " + "a dog runs along the beach " * 20
    return known | times | empty | {"captions": [caption], "bucket": bucket, "frames": frames}


def make_networks(out: Path, device: torch.device) -> None:
    """Folders of a VAE and a text encoder, of real sizes on a GPU."""
    from diffusers import AutoencoderKL
    from transformers import T5Config, T5EncoderModel

    cuda = device.type == "cuda"
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512) if cuda else (8, 8, 8, 8), layers_per_block=2 if cuda else 1,
            norm_num_groups=32 if cuda else 4, latent_channels=4, sample_size=256,
        )  # fmt: skip
        sizes = {"d_model": 4096, "d_ff": 10240, "num_layers": 6, "num_heads": 64} if cuda else {
            "d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2}  # fmt: skip
        text = T5EncoderModel(T5Config(vocab_size=32128, d_kv=64, feed_forward_proj="gated-gelu", **sizes))
    vae.save_pretrained(out / "vae")
    text.bfloat16().save_pretrained(out / "text")
    for file in (BUILTIN / "text").glob("tokenizer*"):
        shutil.copy(file, out / "text")


def real_clips(device: torch.device, out: Path) -> str:
    """jobs/real_clips_gpu.yaml on the 76 real clips next to the checkout: prep, training, FVD; not among the 6 min."""
    shared = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if (path / "data/clips").is_dir()), None)
    assert shared is not None, "there is no shared/data/clips next to the checkout"
    where = ["--data.captions", str(shared / "data/clips/captions.csv"), "--codec.vae", str(shared / "models/taesd"),
             "--data.output", str(out / "shards"), "--train.output", str(out / "runs")]  # fmt: skip
    if device.type == "cpu":
        where += ["--train.steps", "2", "--cluster.gpu", "no"]
    recipe = ROOT / "jobs/real_clips_gpu.yaml"
    began = time.monotonic()
    sora("prep", recipe, *where)
    prep_s = time.monotonic() - began
    sora("train", recipe, *where)
    lines = [json.loads(line) for line in (out / "runs/real_clips_gpu/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return (
        f"prep {prep_s:.0f} s, training {time.monotonic() - began - prep_s:.0f} s, loss {steps[0]['loss']:.2f} to "
        f"{steps[-1]['loss']:.3f}, MFU {steps[-1].get('mfu') or 0:.1%}, {steps[-1]['step_s']:.3f} s a step"
    )
