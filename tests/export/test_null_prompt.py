"""What a released model is given as text: the same as by diffusers' pipelines, in plain `pipe(prompt)` use."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LattePipeline, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from sora_train.codec.text import cut_null, load_text_encoder, load_tokenizer
from sora_train.data.collate import pad_text
from sora_train.diffusion import DiffusionConfig, Sampling, make_objective, sample
from sora_train.diffusion.sampler import make_solver
from sora_train.export import export
from sora_train.model import ModelConfig
from sora_train.model.convert import from_diffusers
from sora_train.sample import Run, embed, generate, load_run
from sora_train.sample.generate import sample_shape

MODEL = ModelConfig(width=32, depth=4, heads=2, text_width=32, sample_size=8)
MILD = DiffusionConfig(kind="ddpm", beta_end=0.001)
HOW = Sampling(sampler="ddim", steps=10, guidance=7.5)
PROMPT = " A Red circle moves LEFT over a lake"


@pytest.fixture(scope="module")
def t5(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random T5 encoder with T5's real tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)
    (folder / "spiece.model").write_bytes((shared / "models/t5_tokenizer/spiece.model").read_bytes())
    return folder


def latents_of(run: Run, noise: torch.Tensor, null_prompt: str, prompt: str, negative: str = "") -> torch.Tensor:
    (text,), null = embed(run, [prompt]), run.text_encoder.encode_null(negative, null_prompt)
    texts, nulls = pad_text([text]), pad_text([cut_null(null, null_prompt, len(text))])
    return sample(run.model, run.objective, noise, *texts, *nulls, how=HOW)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("null_prompt", "cleaning", "prompt"),
    [("padded", "lower", PROMPT), ("eos", "lower", PROMPT), ("eos", "none", PROMPT.lower().strip())],
)
def test_an_exported_pipeline_reads_a_plain_prompt_as_we_do(null_prompt, cleaning, prompt, t5, run_of, tmp_path):
    how = {"null_prompt": null_prompt, "caption_cleaning": cleaning, "max_tokens": 120}
    folder = run_of(MODEL, MILD, text=str(t5), **how)
    export(folder, tmp_path / "out")
    run, pipe = load_run(folder, "cpu"), LattePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *sample_shape(run), generator=torch.Generator().manual_seed(5))
    same = {"num_inference_steps": 10, "guidance_scale": 7.5, "video_length": 3, "height": 32, "width": 48}
    same["latents"] = noise.transpose(1, 2)
    for negative in ("", " Blurry, GREY and much too dark"):
        theirs = pipe(prompt, negative_prompt=negative, output_type="latent", **same).frames.transpose(1, 2)
        if not negative or null_prompt == "padded":
            assert relative(latents_of(run, noise, null_prompt, prompt, negative), theirs) < 1e-5
    frames = pipe(prompt, output_type="np", decode_chunk_size=3, **same).frames[0]
    assert np.abs(frames * 255 - generate(run, [prompt], [5], HOW)[0]).max() < 0.6
    again = load_run(tmp_path / "out", "cpu")
    assert np.abs(generate(again, [prompt], [5], HOW).astype(int) - generate(run, [prompt], [5], HOW)).max() <= 1
    other = latents_of(run, noise, "eos" if null_prompt == "padded" else "padded", prompt)
    theirs = pipe(prompt, output_type="latent", **same).frames.transpose(1, 2)
    assert relative(other, theirs) > 0.05  # so that the two could be told apart


def test_pixart_masks_the_padding_so_its_null_prompt_is_one_token(t5, tmp_path):
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=32,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    transformer.save_pretrained(tmp_path)
    encoder, tokenizer = T5EncoderModel.from_pretrained(t5), load_tokenizer(t5)
    objective = make_objective(MILD, learned_variance=True)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4)  # fmt: skip
    pipe = PixArtAlphaPipeline(tokenizer, encoder, vae, transformer.eval(), make_solver(objective, order=1))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 1, 4, 8, 8)
    how = {"num_inference_steps": 10, "guidance_scale": 7.5, "height": 64, "width": 64, "output_type": "latent"}
    theirs = pipe(PROMPT, latents=noise[:, 0], use_resolution_binning=False, **how).images
    ours = load_text_encoder(str(t5), cleaning="lower")
    text, null = (pad_text([made]) for made in (*ours.encode([PROMPT]), ours.encode_null("", "eos")))
    model = from_diffusers(tmp_path).eval()
    assert relative(sample(model, objective, noise, *text, *null, how=HOW)[:, 0], theirs) < 1e-5


def test_two_tokens_say_what_the_padded_null_prompt_is(t5, run_of):
    run = load_run(run_of(MODEL, MILD, text=str(t5), max_tokens=120, null_prompt="padded"), "cpu")
    tokens = load_tokenizer(t5)("", padding="max_length", max_length=120, return_tensors="pt")
    with torch.no_grad():
        theirs = T5EncoderModel.from_pretrained(t5)(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0]
    torch.testing.assert_close(run.text_encoder.encode_null("", "padded"), theirs, rtol=1e-5, atol=1e-5)
    stored = torch.from_numpy(run.manifest.null_embedding("padded").astype(np.float32))
    torch.testing.assert_close(stored, theirs, rtol=1e-3, atol=1e-3)  # float16
    assert run.manifest.null_embedding("eos").shape == (1, 32)


def test_a_run_whose_captions_were_cleaned_takes_prompts_in_any_case(t5, run_of):
    run = load_run(run_of(MODEL, MILD, text=str(t5), max_tokens=120, caption_cleaning="lower"), "cpu")
    for written in (PROMPT, PROMPT.upper()):
        assert torch.equal(embed(run, [written])[0], embed(run, [PROMPT.lower().strip()])[0])
    lower, upper = (HOW.model_copy(update={"negative": word}) for word in ("grey", "GREY"))
    assert np.array_equal(generate(run, ["a"], [0], lower), generate(run, ["A "], [0], upper))
