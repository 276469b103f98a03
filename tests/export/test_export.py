"""What leaves home: diffusers makes of it what we make of it, and it comes back bit for bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, LattePipeline
from safetensors import safe_open
from transformers import T5Config, T5EncoderModel

from sora_train.codec.vae import load_vae
from sora_train.data.collate import pad_text
from sora_train.diffusion import DiffusionConfig, Sampling, sample
from sora_train.errors import UserError
from sora_train.export import export
from sora_train.export.fold import fold_latent_norm
from sora_train.manifest import Manifest
from sora_train.model import ModelConfig
from sora_train.model.convert import from_diffusers
from sora_train.options import SampleOptions
from sora_train.sample import embed, generate, generate_each, load_run, sample_prompts
from sora_train.sample.condition import encode_given
from sora_train.sample.generate import sample_shape
from sora_train.train import checkpoint

MODEL = ModelConfig(width=32, depth=4, heads=2, text_width=64, sample_size=8)
PROMPT, NEGATIVE = "a red circle moving left", "a blue square"
HEADS = {"4 channels": MODEL, "8 channels": dataclasses.replace(MODEL, learned_variance=True)}
# Leaves so much of the data at its last step that the latents of a random model stay small.
MILD = DiffusionConfig(kind="ddpm", beta_end=0.001)
COSINE = DiffusionConfig(kind="ddpm", beta_schedule="cosine")


@pytest.fixture(scope="module", params=HEADS.values(), ids=HEADS.keys())
def exported(request, run_of, tmp_path_factory) -> tuple[Path, Path]:
    """A run, and what it was exported to, moved since."""
    folder, out = run_of(request.param, MILD), tmp_path_factory.mktemp("out")
    export(folder, out / "before")
    (out / "before").rename(out / "after")
    return folder, out / "after"


def bits(run) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in run.model.state_dict().items()}


def latents_of(run, noise: torch.Tensor, steps: int, guidance: float, texts: list[torch.Tensor]) -> torch.Tensor:
    (text, mask), (null, null_mask) = pad_text([texts[0]]), pad_text([texts[1]])
    how = Sampling(sampler="ddim", steps=steps, guidance=guidance)
    return sample(run.model, run.objective, noise, text, mask, null, null_mask, how)


def latents_of_diffusers(pipe, noise: torch.Tensor, steps: int, guidance: float, texts: list[torch.Tensor]):
    made = pipe(
        prompt_embeds=texts[0][None],
        negative_prompt=None,
        negative_prompt_embeds=texts[1][None],
        latents=noise.transpose(1, 2),
        num_inference_steps=steps,
        guidance_scale=guidance,
        video_length=noise.shape[1],
        height=32,
        width=48,
        mask_feature=False,
        output_type="latent",
    )
    return made.frames.transpose(1, 2)


def test_latents_of_latte_pipeline_equal_ours(exported):
    run, pipe = load_run(exported[0], "cpu"), LattePipeline.from_pretrained(exported[1])
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    noise, texts = torch.randn(1, *sample_shape(run)), [torch.randn(5, 64), torch.randn(5, 64)]
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    for steps, guidance in ((1, 4.0), (10, 4.0), (15, 1.0), (37, 2.5)):
        ours = latents_of(run, noise, steps, guidance, texts)
        assert 0.5 < ours.std() < 5
        assert (ours - latents_of_diffusers(pipe, noise, steps, guidance, texts)).abs().max() < 1e-4
        if 1000 % steps == 0:
            own, pipe.scheduler = pipe.scheduler, ddim
            assert (ours - latents_of_diffusers(pipe, noise, steps, guidance, texts)).abs().max() < 1e-4
            pipe.scheduler = own


@pytest.mark.parametrize("diffusion", [DiffusionConfig(kind="ddpm"), COSINE], ids=["linear", "cosine"])
def test_schedules_that_end_in_noise_keep_their_steps_in_the_pipeline(diffusion, run_of, tmp_path):
    folder = run_of(MODEL, diffusion)
    export(folder, tmp_path / "out")
    run, pipe = load_run(folder, "cpu"), LattePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    noise, texts = torch.randn(1, *sample_shape(run)), [torch.randn(5, 64), torch.randn(5, 64)]
    ours, theirs = (of(it, noise, 10, 3.0, texts) for of, it in ((latents_of, run), (latents_of_diffusers, pipe)))
    assert ours.std() > 100  # a random model's error in epsilon, divided by the root of what is left of the data
    assert (ours - theirs).abs().max() < 1e-5 * ours.std()


def test_the_lines_of_the_model_card_make_what_sora_sample_makes(exported, tmp_path, monkeypatch):
    folder, out = exported
    card = (out / "README.md").read_text()
    lines = card.split("```python\n")[1].split("\n```\n")[0]
    assert "<script>" not in card.replace(lines, "")
    lines = lines.replace('export_to_video(frames, "sample.mp4", fps=8)', "")
    lines = lines.replace("generator=torch.Generator().manual_seed(0),", "latents=noise, output_type='np',")
    run = load_run(folder, "cpu")
    noise = torch.randn(sample_shape(run), generator=torch.Generator().manual_seed(0))[None].transpose(1, 2)
    monkeypatch.chdir(out)
    exec(lines, there := {"noise": noise})
    ours = generate(run, ['a "red" circle ``` <script>'], [0])[0].astype(float)
    assert np.abs(there["frames"] * 255 - ours).mean() < 0.6  # the empty prompt is kept in float16 beside the shards


def test_a_latte_pipeline_takes_no_image_and_sora_sample_gives_it_one(run_of, tmp_path):
    folder = run_of(MODEL, MILD, conditioning={"probability": 0.5})
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "The pipeline takes no image" in card
    assert "--image first.png`" in card
    run, folded = load_run(folder, "cpu"), load_run(tmp_path / "out", "cpu")
    picture = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), np.uint8)
    given = encode_given(run, picture)
    torch.testing.assert_close(encode_given(folded, picture), given, rtol=1e-4, atol=1e-4)
    ours, theirs = (next(generate_each(each, [PROMPT], [0], given=[given])).astype(int) for each in (run, folded))
    assert np.abs(ours - theirs).max() <= 1


def test_an_export_comes_back_bit_for_bit(exported, tmp_path):
    folder, out = exported
    export(folder, tmp_path / "weights", weights_only=True)
    ours = bits(load_run(folder, "cpu"))
    assert bits(load_run(out, "cpu")) == ours
    assert bits(load_run(tmp_path / "weights", "cpu")) == ours
    again = from_diffusers(out)  # as model.init_from reads it
    assert {name: tensor.numpy().tobytes() for name, tensor in again.state_dict().items()} == ours
    export(out, tmp_path / "again")  # and once more, from the export
    assert bits(load_run(tmp_path / "again", "cpu")) == ours


def test_an_export_samples_what_its_run_samples(exported, tmp_path):
    folder, out = exported
    export(folder, tmp_path / "weights", weights_only=True)
    run, whole, alone = (load_run(place, "cpu") for place in (folder, out, tmp_path / "weights"))
    ask = (["a red circle", PROMPT], [3, 4], Sampling(steps=3, guidance=2.0, negative=NEGATIVE))
    ours = generate(run, *ask)
    assert np.array_equal(ours, generate(alone, *ask))
    assert np.abs(ours.astype(int) - generate(whole, *ask)).max() <= 1  # its VAE rounds elsewhere
    files = [
        sample_prompts(place, SampleOptions(prompt=(PROMPT,), steps=2, format=("gif",))) for place in (folder, out)
    ]
    assert [file.name for (file,) in files] == ["a-red-circle-moving-left-seed0.gif"] * 2
    assert files[1][0].parent == out / "samples" / "prompts"
    shutil.rmtree(out / "samples")


def test_raw_weights_are_put_together_from_their_parts_and_say_so(run_of, tmp_path):
    folder = run_of(MODEL)
    averaged, trained = load_run(folder, "cpu"), load_run(folder, "cpu", weights="raw")
    place = folder / "checkpoints" / "step_00000020"
    found = trained.model.state_dict()
    parts = [place / checkpoint.part_name(rank, 2) for rank in range(2)]
    for name in ("patch_in.weight", "blocks.3.table"):
        halves = []
        for part in parts:
            with safe_open(part, "pt") as file:
                halves.append(file.get_tensor(f"weights/{name}"))
        assert torch.equal(found[name].flatten(), torch.cat(halves))
    assert bits(averaged) != bits(trained)
    export(folder, tmp_path / "raw", weights="raw")
    assert bits(load_run(tmp_path / "raw", "cpu")) == bits(trained)
    assert "trained (not averaged)" in (tmp_path / "raw" / "README.md").read_text()
    with pytest.raises(UserError, match="holds the raw weights alone; for the ema ones name the run"):
        load_run(tmp_path / "raw", weights="ema")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    part = damaged / "checkpoints" / "step_00000020" / checkpoint.part_name(1, 2)
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(bytes(content))
    with safe_open(part, "pt") as file:
        last = max(file.keys())
    with pytest.raises(UserError, match="another checksum") if last.startswith("weights") else pytest.raises(UserError):
        load_run(damaged, weights="raw")
    part.unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_run(damaged, weights="raw")
    with pytest.raises(UserError, match="--weights ema"):
        load_run(damaged / "checkpoints" / "step_00000020", weights="raw")
    assert bits(load_run(damaged)) == bits(averaged)


@pytest.mark.parametrize("convolutions", [True, False])
def test_a_folded_vae_makes_and_takes_normalised_latents(convolutions, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        use_quant_conv=convolutions,
        use_post_quant_conv=convolutions,
        latents_mean=[0.3, -2.0, 1.0, 0.0],
        latents_std=[1.5, 0.2, 3.0, 1.0],
    )
    vae.save_pretrained(tmp_path / "vae")
    ours = load_vae(str(tmp_path / "vae"))
    fold_latent_norm(vae, ours.files.mean, ours.files.std)
    vae.save_pretrained(tmp_path / "folded")
    folded = load_vae(str(tmp_path / "folded"))
    assert folded.mean.tolist() == [0.0] * 4
    assert folded.std.tolist() == [1.0] * 4
    frames = torch.randint(256, (1, 2, 16, 16, 3), dtype=torch.uint8)
    (mean, log), (mean_there, log_there) = ours.encode(frames)[0], folded.encode(frames)[0]
    assert torch.allclose(ours.normalise(mean), mean_there, atol=1e-5)
    assert torch.allclose(log - 2 * ours.std.log()[:, None, None], log_there, atol=1e-5)
    z = torch.randn(1, 2, 4, 8, 8)
    raw, there = ours.model.decode(ours.denormalise(z)[0]).sample, folded.model.decode(z[0]).sample
    assert torch.allclose(raw, there, atol=1e-4)


def test_a_vae_that_one_scalar_normalises_needs_no_convolutions_and_others_are_refused(run_of, tmp_path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
        scaling_factor=0.5,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    folder = run_of(MODEL, vae=str(tmp_path / "tiny"))
    export(folder, tmp_path / "out")
    pipe = LattePipeline.from_pretrained(tmp_path / "out")
    assert pipe.vae.config.scaling_factor == 0.5
    run, whole = (load_run(place, "cpu") for place in (folder, tmp_path / "out"))
    assert np.array_equal(generate(run, [PROMPT], [0]), generate(whole, [PROMPT], [0]))
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config |= {"latents_mean": [0.0, 0.0, 0.5, 0.0], "latents_std": [1.0] * 4}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="an AutoencoderTiny has no 1 x 1 convolutions .* --weights_only"):
        export(run_of(MODEL, vae=str(tmp_path / "tiny")), tmp_path / "refused")


def test_a_text_encoder_in_bfloat16_with_t5s_own_tokenizer_goes_along_as_the_pipeline_reads_it(
    run_of, tmp_path, shared
):
    config = T5Config(vocab_size=32128, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    T5EncoderModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "t5")
    shutil.copy(shared / "models" / "t5_tokenizer" / "spiece.model", tmp_path / "t5")
    folder = run_of(MODEL, MILD, vae=str(shared / "models" / "taesd"), text=str(tmp_path / "t5"))
    export(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "t5")
    run, pipe = load_run(tmp_path / "out", "cpu"), LattePipeline.from_pretrained(tmp_path / "out")
    assert pipe.text_encoder.dtype == torch.float32
    ids = pipe.tokenizer(PROMPT, return_tensors="pt").input_ids
    assert torch.allclose(pipe.text_encoder(ids)[0][0], embed(run, [PROMPT])[0], atol=1e-5)
    pipe.set_progress_bar_config(disable=True)
    size = {"video_length": 3, "height": 32, "width": 48, "num_inference_steps": 2}
    assert len(pipe(PROMPT, clean_caption=False, **size).frames[0]) == 3


REFUSED = {
    "model.attention is joint": (dataclasses.replace(MODEL, attention="joint"), None),
    "model.pooled_text is True": (dataclasses.replace(MODEL, pooled_text=True), None),
    "model.temporal_positions is rotary": (dataclasses.replace(MODEL, temporal_positions="rotary"), None),
    "model.sample_frames is 16": (dataclasses.replace(MODEL, sample_frames=16), None),
    "diffusion.kind is flow": (MODEL, DiffusionConfig()),
    "diffusion.prediction is v": (MODEL, DiffusionConfig(kind="ddpm", prediction="v")),
}


@pytest.mark.parametrize(("says", "asked"), REFUSED.items(), ids=REFUSED.keys())
def test_what_a_pipeline_cannot_hold_is_refused_with_the_reason_and_leaves_as_weights(says, asked, run_of, tmp_path):
    model, diffusion = asked
    folder = run_of(model, diffusion) if diffusion else run_of(model)
    with pytest.raises(UserError, match=rf"can't become a LattePipeline: {says}.* --weights_only"):
        export(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export(folder, tmp_path / "out", weights_only=True)
    assert bits(load_run(tmp_path / "out", "cpu")) == bits(load_run(folder, "cpu"))


def test_all_that_is_in_the_way_of_a_pipeline_is_named_at_once(run_of, tmp_path):
    model = dataclasses.replace(
        MODEL, cross_attention_in="every", temporal_positions="input", pooled_text=True, sample_frames=16
    )
    with pytest.raises(UserError) as refused:
        export(run_of(model, DiffusionConfig()), tmp_path / "out")
    keys = (
        "model.cross_attention_in",
        "model.temporal_positions",
        "model.pooled_text",
        "model.sample_frames",
        "diffusion.kind",
    )
    assert all(f"{key} is " in str(refused.value) for key in keys)


def test_the_card_does_not_count_held_out_clips_as_trained_on(run_of, tmp_path):
    folder = run_of(MODEL)
    manifest = Manifest.load(str(folder))
    manifest.model_copy(update={"held_out": {"3x32x48": 2}}).save(str(folder))
    export(folder, tmp_path / "out", weights_only=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Trained on** 5 clips, frames x height x width: 3x32x48 (5 clips)" in card
    assert "2 more were held out" in card


def test_nothing_is_ever_written_over(exported, tmp_path):
    folder, out = exported
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds an export of step 20; remove it first, or name another folder"):
        export(folder, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty; name another folder"):
        export(folder, tmp_path / "mine")
    with pytest.raises(UserError, match="OUT is a folder"):
        export(folder, tmp_path / "w.safetensors", weights_only=True)
    with pytest.raises(UserError, match="no folder"):
        export(folder, tmp_path / "mine" / "letter.txt")
    for run in (folder, tmp_path / "nowhere"):  # before anything is loaded
        with pytest.raises(UserError, match="can't be written"):
            export(run, tmp_path / "mine" / "letter.txt" / "out", weights_only=True)
    (tmp_path / "empty").mkdir()
    export(folder, tmp_path / "empty", weights_only=True)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def test_what_an_export_or_a_run_lacks_is_named_with_what_mends_it(run_of, tmp_path):
    def said(place: Path, weights: str | None = None) -> str:
        with pytest.raises(UserError) as caught:
            load_run(place, weights=weights)
        return str(caught.value)

    folder, out = run_of(MODEL), tmp_path / "out"
    export(folder, out, weights_only=True)
    assert said(out / "model.safetensors") == f"{out / 'model.safetensors'} is a file; name the folder: {out}"
    whole = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(whole[:-10])
    assert said(out).endswith("manifest.json is damaged, or of another version of sora_train; export the run again")
    (out / "manifest.json").unlink()
    assert said(out) == f"{out} can't be read: there is no manifest.json in {out}; export the run again"
    (out / "sora_export.json").unlink()
    assert "is an export without sora_export.json" in said(out)
    shutil.copytree(folder, tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / "step_00000020"
    (place / "state.json").unlink()
    assert said(tmp_path / "run", "raw").endswith(
        "none of its 1 is whole; the averaged weights can be had (--weights ema)"
    )
    (place / "ema.safetensors").unlink()
    assert said(tmp_path / "run").endswith("none of its 1 is whole; run `sora train` again")
    shutil.rmtree(place)
    assert "no complete checkpoint yet" in said(tmp_path / "run")


def test_a_flipped_byte_in_a_pipelines_transformer_is_noticed(run_of, tmp_path):
    out = export(run_of(MODEL), tmp_path / "out")
    (file,) = (out / "transformer").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"transformer is damaged or was changed since; export the run again"):
        load_run(out)
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    load_run(out)


def test_a_damaged_export_is_named(run_of, tmp_path):
    export(run_of(MODEL), tmp_path / "out", weights_only=True)
    content = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_run(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(bytes(content[:-8]))
    with pytest.raises(UserError, match="cut short"):
        load_run(tmp_path / "out")
    (tmp_path / "out" / "sora_export.json").write_text('{"format": 1, "kind": "house"}')
    with pytest.raises(UserError, match=r"sora_export\.json can't be read"):
        load_run(tmp_path / "out")
