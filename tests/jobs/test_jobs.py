"""The recipes in jobs/: what their first lines say works, models are the paper's, and each goes the whole road."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from wan_models import TEXT_WIDTH, make_wan_pipeline

from sora_train.data.config import undividable_shapes
from sora_train.flags import parse_flags
from sora_train.model.latte import Latte
from sora_train.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs").glob("*.yaml"))
CLUSTER = [job for job in JOBS if not Path(job).stem.startswith(("quickstart", "real_clips"))]
"""Those that are written for a cluster with shared storage."""

# Ma et al. 2024 (arXiv 2401.03048): blocks, width, heads. latte_t2v: maxin-cn/Latte-1's transformer/config.json. Wan:
# that of Wan-AI/Wan2.1-T2V-1.3B-Diffusers and Wan2.2-TI2V-5B-Diffusers; the small one is ours.
PAPER = {
    "latte_s_256": (12, 384, 6),
    "latte_b_256": (12, 768, 12),
    "flow_b_256": (12, 768, 12),
    "latte_l_256": (24, 1024, 16),
    "latte_xl_256": (28, 1152, 16),
    "finetune_latte_t2v_512": (56, 1152, 16),
    "wan2.1_1.3b_finetune": (30, 1536, 12),
    "wan2.2_5b_finetune": (30, 3072, 24),
    "wan_256px": (12, 768, 12),
}


def command_of(job: str) -> list[str]:
    """The words of the command that a job's first line is."""
    first = (ROOT / job).read_text().splitlines()[0]
    assert first.startswith("# ")
    return shlex.split(first[2:])


@pytest.mark.parametrize("job", JOBS)
def test_a_jobs_first_line_is_the_command_that_submits_it(job: str):
    words = command_of(job)
    assert words[:6] == ["ray", "job", "submit", "--working-dir", ".", "--"]
    sora, verb, *rest = words[6:]
    assert (sora, verb) in (("sora", "prep"), ("sora", "train"))
    flags, files = parse_flags(rest, Recipe)
    assert files == [job]
    load_recipe(ROOT / job, flags)


@pytest.mark.parametrize("job", [job for job in CLUSTER if "encode" not in job])
def test_a_job_has_the_papers_size_and_its_shapes_divide(job: str):
    recipe = load_recipe(ROOT / job)
    name, model, train = Path(job).stem, recipe.model, recipe.train
    assert recipe.name == name
    assert (model.depth, model.width, model.heads, model.patch) == (*PAPER[name], 2)
    space, time = model.vae_factors
    assert undividable_shapes(recipe.data, space, time, model.patch) == []
    if model.family == "latte":
        assert recipe.data.height == recipe.data.width == model.sample_size * space
    assert train.batch_size % (recipe.cluster.fewest * train.micro_batch_size) == 0
    assert train.betas == (0.9, 0.999)
    assert train.weight_decay == 0
    if name.startswith("latte"):
        assert (train.learning_rate, train.ema_decay, model.learned_variance) == (1e-4, 0.9999, True)
        assert (recipe.diffusion.kind, recipe.diffusion.beta_start, recipe.diffusion.beta_end) == ("ddpm", 1e-4, 0.02)


@pytest.mark.parametrize("job", CLUSTER)
def test_a_job_for_a_cluster_lives_on_shared_storage_and_says_how_to_plan_it(job: str):
    recipe, text = load_recipe(ROOT / job), (ROOT / job).read_text()
    places = [recipe.data.output, recipe.codec.models, *([recipe.train.output] if "encode" not in job else [])]
    assert all(place.startswith("/shared/") for place in places), places
    assert (f"preflight --plan {job}" in text) or (f"prep {job} --plan" in text)
    assert recipe.tracking.wandb in ("offline", "off")  # no key is needed to begin


def test_the_runs_at_256_px_read_the_shards_that_the_encoding_makes():
    encode = load_recipe(ROOT / "jobs/encode_only.yaml")
    readers = [load_recipe(ROOT / job) for job in CLUSTER if job.endswith("_256.yaml")]
    assert len(readers) == 5
    for recipe in readers:
        assert recipe.data.output == encode.data.output
        assert (recipe.data.shapes, recipe.data.fps) == (encode.data.shapes, encode.data.fps)
        assert recipe.data.holdout_fraction == encode.data.holdout_fraction
        assert recipe.codec == encode.codec
        assert recipe.model.text_width == encode.model.text_width


def test_the_largest_job_has_as_many_parameters_as_the_released_model():
    """1.06 G: field.md's LatteT2V; counted without memory."""
    with torch.device("meta"):
        model = Latte(load_recipe(ROOT / "jobs/finetune_latte_t2v_512.yaml").model)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1.06e9, rel=0.01)


def shrunken(job: str, folder: Path) -> Recipe:
    """The job at its own attention, diffusion, ZeRO stage, checkpointing, guidance and verbs, but: 2 blocks 32 wide in
    place of the preset's, clips of 4 or 5 frames of 64 px, the embedded networks or a random Wan's, float32, one
    worker, two steps.
    """
    recipe = load_recipe(ROOT / job)
    wan, vae, text = recipe.model.family == "wan", "builtin", "builtin"
    model = {"model.depth": 2, "model.width": 32, "model.heads": 2}
    model |= {"model.text_width": TEXT_WIDTH if wan else 64} | ({} if wan else {"model.sample_size": 8})
    if wan:
        vae = text = str(make_wan_pipeline(folder / "wan", "2.2" if recipe.model.in_channels == 48 else "2.1"))
        model |= {"model.feed_forward": 48}
    data = {"data.captions": str(folder / "clips/captions.csv"), "data.output": str(folder / "shards"),
            "data.frames": 5 if wan else 4, "data.fps": 8, "data.height": 64, "data.width": 64,
            "data.max_enlarge": 0}  # fmt: skip
    codec = {"codec.vae": vae, "codec.text": text, "codec.models": "",
             "codec.precision": "fp32", "codec.text_precision": "fp32"}  # fmt: skip
    train = {"train.output": str(folder / "runs"), "train.steps": 2, "train.batch_size": 2, "train.micro_batch_size": 1,
             "train.precision": "fp32", "train.log_every": 1, "train.checkpoint_every": 2}  # fmt: skip
    rest = {"cluster.workers": 1, "cluster.cpus_per_worker": 1, "cluster.gpu": "no", "cluster.address": "local",
            "tracking.wandb": "off"}  # fmt: skip
    changes: dict[str, object] = {**model, **data, **codec, **train, **rest}
    if recipe.validation.prompts:
        changes |= {"validation.every": 2, "validation.steps": 2, "validation.resources": {"CPU": 1}}
        changes |= {"validation.prompts": recipe.validation.prompts[:1]}
    if recipe.model.init_from:
        start = vae if wan else start_weights(load_recipe(ROOT / job, changes), folder)
        changes |= {"model.init_from": start}
    return load_recipe(ROOT / job, changes)


def start_weights(recipe: Recipe, folder: Path) -> str:
    """Weights of the shrunken shape in diffusers' format, as the released ones are."""
    from sora_train.model.convert import to_diffusers

    torch.manual_seed(0)
    to_diffusers(Latte(recipe.model), folder / "start" / "transformer", frames=4)
    return str(folder / "start")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("job", JOBS)
def test_a_shrunken_job_goes_the_whole_road(job: str, tmp_path: Path):
    from data_prep.pipeline import prep
    from sora_train.launch.trainer import launch_training
    from sora_train.quickstart.shapes import make_clips

    make_clips(tmp_path / "clips", 12)
    recipe = shrunken(job, tmp_path)
    prep(recipe)
    if command_of(job)[7] == "prep":
        assert list((tmp_path / "shards").glob("bucket=4x64x64/*.parquet"))
        return
    run = launch_training(recipe)
    assert (run / "checkpoints/step_00000002/ema.safetensors").is_file()
    assert list((run / "samples").rglob("*.mp4"))
    shutil.rmtree(tmp_path)
