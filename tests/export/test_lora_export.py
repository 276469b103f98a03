"""Runs that trained adapters: their base with them is sampled, and diffusers makes the same of what is exported."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from wan_models import SHIFT, make_wan_pipeline, open_wan_pipeline

from sora_train.cli import main
from sora_train.data.collate import pad_text
from sora_train.diffusion import DiffusionConfig, Sampling, sample
from sora_train.errors import RecipeError, UserError
from sora_train.export import export
from sora_train.lora.adapters import adapter_state, add_adapters
from sora_train.lora.config import LoraConfig
from sora_train.lora.files import DIFFUSERS_FILE
from sora_train.model import ModelConfig, Transformer, build
from sora_train.model.convert import config_from_diffusers
from sora_train.recipe import load_recipe, save_recipe
from sora_train.sample import Run, embed, generate, load_run
from sora_train.sample.generate import sample_shape
from sora_train.sample.lora import LoraFile, parse_lora
from sora_train.train.checkpoint import Snapshot, State
from sora_train.train.frozen_base import base_hash
from tests.lora.test_files import content, randomised

PROMPT = "a  RED circle &amp; a dog"
LORA = LoraConfig(rank=3, alpha=4.5, targets=("to_q", "to_k", "to_v", "to_out", "ff"))
LATTE = ModelConfig(width=48, depth=4, heads=4, text_width=64, sample_size=4)


def adapters(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    model = build(config)
    add_adapters(model, LORA)
    randomised(model, seed)
    return {name: tensor.clone() for name, tensor in adapter_state(model).items()}


def adapt(folder: Path, base: Path) -> Path:
    """Makes a whole run one of adapters on a base, at step 20; averaged and trained ones differ."""
    recipe = load_recipe(folder / "recipe.yaml")
    model = recipe.model.__class__(**{**vars(recipe.model), "init_from": str(base)})
    save_recipe(recipe.model_copy(update={"lora": LORA, "model": model}), folder / "recipe.yaml")
    checkpoint = folder / "checkpoints" / "step_00000020"
    shutil.rmtree(checkpoint)
    averaged, trained = adapters(model, 1), adapters(model, 2)
    owned = {
        f"{kind}/{n}": t.flatten() + 0
        for kind in ("weights", "exp_avg", "exp_avg_sq", "ema")
        for n, t in trained.items()
    }
    state = State(step=20, base=base_hash(base), base_from=str(base))
    Snapshot(state, 0, 1, 1, owned, dict.fromkeys(trained, 0), averaged, "token").write(checkpoint)
    return folder


@pytest.fixture(scope="module")
def adapted_wan(run_of, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """adapted_wan(kind): a run of adapters on a released pipeline, and that pipeline."""

    def make(kind: str) -> tuple[Path, Path]:
        base = make_wan_pipeline(tmp_path_factory.mktemp("base"), kind)
        model = config_from_diffusers(json.loads((base / "transformer" / "config.json").read_text()))
        codec = {"vae": str(base), "text": str(base), "caption_cleaning": "wan", "max_tokens": 512}
        width = {"2.1": 48, "2.2": 64}[kind]
        flow = DiffusionConfig(shift=SHIFT[kind])
        run = run_of(model, flow, frames=5, width=width, validation={"sampler": "unipc"}, **codec)
        return adapt(run, base), base

    return make


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def exported(request, adapted_wan, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A run, its base, and its exported adapters."""
    run, base = adapted_wan(request.param)
    return run, base, export(run, tmp_path_factory.mktemp("out") / "adapters", lora=True)


@pytest.fixture(scope="module")
def wan(adapted_wan, tmp_path_factory) -> tuple[Path, Path, Path]:
    run, base = adapted_wan("2.1")
    return run, base, export(run, tmp_path_factory.mktemp("out") / "adapters", lora=True)


def bits(model: Transformer) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def our_latents(run: Run, noise: torch.Tensor) -> torch.Tensor:
    text, mask = pad_text(embed(run, [PROMPT]))
    null, null_mask = pad_text([run.text_encoder.encode_null("", run.recipe.codec.null_prompt)])
    how = Sampling(sampler="unipc", steps=4, guidance=5.0)
    return sample(run.predict, run.objective, noise, text, mask, null, null_mask, how)


def their_latents(pipe, run: Run, noise: torch.Tensor) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    size = {"num_frames": 5, "height": run.manifest.height, "width": run.manifest.width}
    how = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    return pipe(PROMPT, latents=noise.transpose(1, 2), **size, **how).frames.transpose(1, 2)


def noise_of(run: Run) -> torch.Tensor:
    return torch.randn(1, *sample_shape(run), generator=torch.Generator().manual_seed(1))


def test_adapters_in_diffusers_make_the_latents_of_sora_sample(exported):
    folder, base, out = exported
    run, noise = load_run(folder, "cpu"), noise_of(load_run(folder, "cpu"))
    ours, pipe = our_latents(run, noise), open_wan_pipeline(base)
    before = their_latents(pipe, run, noise)
    pipe.load_lora_weights(str(out), weight_name=DIFFUSERS_FILE)
    bound = 1e-4 * max(1, float(ours.std()))
    assert (ours - before).abs().max() > 100 * bound
    assert (ours - their_latents(pipe, run, noise)).abs().max() < bound
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(out), weight_name="tiny_comfyui.safetensors")
    assert (ours - their_latents(pipe, run, noise)).abs().max() < bound


def test_a_merged_pipeline_makes_the_latents_of_sora_sample(exported, tmp_path):
    folder, base, _ = exported
    run, whole = load_run(folder, "cpu"), export(folder, tmp_path / "whole", merge=True)
    assert f"**Base** `{base}`: adapters (LoRA) of rank 3 are added" in (whole / "README.md").read_text()
    noise = noise_of(run)
    ours = our_latents(run, noise)
    theirs = their_latents(open_wan_pipeline(whole), run, noise)
    assert (ours - theirs).abs().max() < 1e-4 * max(1, float(ours.std()))
    assert bits(load_run(whole, "cpu").model) == bits(run.model)
    alone = export(folder, tmp_path / "alone", merge=True, weights_only=True)
    assert bits(load_run(alone, "cpu").model) == bits(run.model)


def test_a_file_on_the_base_is_the_run_itself(wan):
    folder, base, out = wan
    ours = bits(load_run(folder, "cpu").model)
    for file in (DIFFUSERS_FILE, "tiny_comfyui.safetensors"):
        assert bits(load_run(base, "cpu", lora=[LoraFile(out / file)]).model) == ours
    assert bits(load_run(base, "cpu").model) != ours


def test_the_command_exports_both_ways(wan, tmp_path, capsys):
    folder, _, out = wan
    assert main(["export", str(folder), str(tmp_path / "lora"), "--lora"]) == 0
    assert content(tmp_path / "lora" / DIFFUSERS_FILE) == content(out / DIFFUSERS_FILE)
    assert main(["export", str(folder), str(tmp_path / "whole"), "--merge", "--weights_only"]) == 0
    assert main(["export", str(folder), str(tmp_path / "x")]) == 2
    assert "--lora writes the adapters alone" in capsys.readouterr().err


def test_raw_weights_are_the_trained_adapters(wan, tmp_path):
    folder, base, _ = wan
    raw = export(folder, tmp_path / "raw", lora=True, weights="raw")
    ours = load_run(folder, "cpu", weights="raw").model
    assert bits(load_run(base, "cpu", lora=parse_lora([str(raw)])).model) == bits(ours)
    assert bits(ours) != bits(load_run(folder, "cpu").model)
    assert "trained (not averaged)" in (raw / "README.md").read_text()


def test_another_or_a_missing_base_is_refused_with_both_hashes(adapted_wan, tmp_path):
    folder, base = adapted_wan("2.1")
    (file,) = (base / "transformer").glob("*.safetensors")
    content, before = file.read_bytes(), base_hash(base)
    file.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=rf"{before[:12]}, and .* has {base_hash(base)[:12]}"):
        load_run(folder, "cpu")
    base.rename(tmp_path / "away")
    with pytest.raises(UserError, match="holds adapters, and their base is neither in .* nor in .* Put it back there"):
        load_run(folder, "cpu")


def test_the_choice_between_adapters_and_a_whole_model_is_asked_for(wan, run_of, tmp_path):
    folder, _, out = wan
    with pytest.raises(RecipeError, match=r"--lora writes the adapters alone.*; --merge writes a whole model"):
        export(folder, tmp_path / "x")
    with pytest.raises(RecipeError, match="--lora writes adapters alone, and --merge a whole model"):
        export(folder, tmp_path / "x", lora=True, merge=True)
    whole = run_of(LATTE, DiffusionConfig(kind="ddpm"))
    for flag in ("lora", "merge"):
        with pytest.raises(RecipeError, match=f"has no adapters: it holds a whole model. Leave out --{flag}"):
            export(whole, tmp_path / "x", **{flag: True})
    with pytest.raises(UserError, match="holds adapters alone. Name their base, and add them: sora sample BASE --lora"):
        load_run(out, "cpu")
    with pytest.raises(UserError, match="holds adapters alone"):
        export(out, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_the_adapters_are(wan):
    _, base, out = wan
    card = (out / "README.md").read_text()
    count = sum(tensor.numel() for tensor in load_file(out / DIFFUSERS_FILE).values())
    assert f"rank 3,\nalpha 4.5, {count:,} parameters on to_q, to_k, to_v, to_out, ff" in card
    assert f"**Base** `{base}`, sha256 `{base_hash(base)[:16]}…`" in card
    assert "`tiny_comfyui.safetensors` has its names" in card
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "manifest.json",
        DIFFUSERS_FILE,
        "recipe.yaml",
        "sora_export.json",
        "tiny_comfyui.safetensors",
    ]


def lines_of_card(out: Path) -> str:
    lines = (out / "README.md").read_text().split("```python\n")[1].split("\n```\n")[0]
    lines = lines.replace('export_to_video(frames, "sample.mp4", fps=8)', "")
    return lines.replace("generator=torch.Generator().manual_seed(0),", "latents=noise, output_type='np',")


def test_the_lines_of_the_card_make_what_sora_sample_makes(wan, monkeypatch):
    folder, base, out = wan
    run = load_run(folder, "cpu")
    noise = torch.randn(sample_shape(run), generator=torch.Generator().manual_seed(0))[None].transpose(1, 2)
    monkeypatch.chdir(out)
    exec(lines_of_card(out), there := {"noise": noise, "BASE": str(base)})
    ours = generate(run, run.recipe.validation.prompts, [0])[0].astype(float)
    assert np.abs(there["frames"] * 255 - ours).mean() < 0.6


def test_the_lines_of_lattes_card_make_what_sora_sample_makes(run_of, tmp_path, monkeypatch):
    settings = {"caption_cleaning": "lower", "null_prompt": "padded", "validation": {"prompts": ["a red circle"]}}
    base = export(
        run_of(LATTE, DiffusionConfig(kind="ddpm"), **settings),
        tmp_path / "base",
    )
    folder = adapt(
        run_of(LATTE, DiffusionConfig(kind="ddpm"), **settings),
        base,
    )
    out = export(folder, tmp_path / "adapters", lora=True)
    run = load_run(folder, "cpu")
    noise = torch.randn(sample_shape(run), generator=torch.Generator().manual_seed(0))[None].transpose(1, 2)
    monkeypatch.chdir(out)
    exec(lines_of_card(out), there := {"noise": noise, "BASE": str(base)})
    ours = generate(run, run.recipe.validation.prompts, [0])[0].astype(float)
    assert np.abs(there["frames"] * 255 - ours).mean() < 0.6
    plain = generate(load_run(base, "cpu"), run.recipe.validation.prompts, [0])[0].astype(float)
    assert np.abs(ours - plain).mean() > 2


def test_the_card_of_a_base_that_no_pipeline_holds_has_no_code_of_diffusers(run_of, tmp_path):
    joint = dataclasses.replace(LATTE, attention="joint")
    folder = adapt(run_of(joint), export(run_of(joint), tmp_path / "base", weights_only=True))
    card = (export(folder, tmp_path / "adapters", lora=True) / "README.md").read_text()
    assert "from diffusers" not in card
    assert "sora sample BASE --lora ." in card
