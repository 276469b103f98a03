"""The README's commands for Wan, by the recipe in jobs/ on real clips, with a small random pipeline in Wan's place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from wan_models import Kind, make_wan_pipeline, open_wan_pipeline

from sora_train.model.convert import config_from_diffusers
from sora_train.video import read_mp4

ROOT = Path(__file__).parents[2]
PROMPT = "a small stream of water flows between rocks"


def sora(*words: object) -> str:
    """Runs a command as a user does; returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "sora_train.cli", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "job", "repository"),
    [
        ("2.1", "wan2.1_1.3b_finetune", "Wan2.1-T2V-1.3B-Diffusers"),
        ("2.2", "wan2.2_5b_finetune", "Wan2.2-TI2V-5B-Diffusers"),
    ],
)
def test_a_wan_is_finetuned_measured_and_leaves_as_a_pipeline(
    kind: Kind, job: str, repository: str, tmp_path: Path, shared: Path
):
    size = (9, 64, 96)
    # where `sora download` puts it
    base = make_wan_pipeline(tmp_path / "models" / f"Wan-AI--{repository}", kind)
    model = config_from_diffusers(json.loads((base / "transformer" / "config.json").read_text()))
    shape = [word for key, n in zip(("frames", "height", "width"), size, strict=True) for word in (f"--{key}", n)]
    flags: list[object] = [f"--data.{word[2:]}" if str(word).startswith("--") else word for word in shape]
    for key in ("width", "depth", "heads", "feed_forward", "text_width"):
        flags += [f"--model.{key}", getattr(model, key)]
    settings = {
        "data": {"captions": shared / "data/clips/captions.csv", "output": tmp_path / "shards", "fps": 8},
        "selection": {"scene_cuts": "false", "duplicates": "false"},
        "codec": {"models": tmp_path / "models", "text_precision": "fp32"},
        "train": {"output": tmp_path / "runs", "steps": 4, "batch_size": 2, "precision": "fp32", "log_every": 1},
        "validation": {"every": 4, "steps": 2, "prompts": PROMPT, "holdout_clips": 4},
        "cluster": {"workers": 2, "cpus_per_worker": 1, "gpu": "no", "address": "local"},
        "tracking": {"wandb": "off"},
    }
    for section, keys in settings.items():
        flags += [word for key, value in keys.items() for word in (f"--{section}.{key}", value)]
    flags += ["--train.checkpoint_every", 4, "--data.holdout_fraction", 0.2, "--data.max_enlarge", 0]
    recipe = [ROOT / "jobs" / f"{job}.yaml", *flags, "--validation.resources.GPU", 0]

    sora("sample", base, "--prompt", PROMPT, *shape, "--steps", 2, "--format", "mp4", "--out", tmp_path / "base")
    sora("prep", *recipe)
    counts = json.loads(sora("inspect", tmp_path / "shards", "--json"))
    assert counts["written"] > 20
    sora("train", *recipe)
    run = tmp_path / "runs" / job
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] > 0 for line in lines if "loss" in line] == [True] * 4
    (validation,) = [line for line in lines if line.get("validation")]
    assert validation["holdout_loss"] > 0
    assert list((run / "samples").rglob("*.mp4"))
    sora("eval", run, "--holdout_clips", 4)
    assert json.loads((run / "eval.json").read_text())["holdout_loss"] == pytest.approx(validation["holdout_loss"])
    sora("export", run, tmp_path / "out")
    sora("sample", tmp_path / "out", "--prompt", PROMPT, "--format", "mp4", "--out", tmp_path / "samples")
    (file,) = (tmp_path / "samples").glob("*.mp4")
    assert read_mp4(file).shape == (*size, 3)
    pipe = open_wan_pipeline(tmp_path / "out")
    made = pipe(PROMPT, num_frames=size[0], height=size[1], width=size[2], num_inference_steps=2, output_type="np")
    assert made.frames[0].shape == (*size, 3)
