"""A checkpoint's figures: what is asked for and can be had, and a word for the rest."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sora_train import cli
from sora_train.diffusion import ConditioningConfig, DiffusionConfig
from sora_train.errors import UserError
from sora_train.evaluate import evaluate, measure
from sora_train.evaluate.heldout import BINS, ranked
from sora_train.evaluate.i3d import I3D, load_i3d, shapes
from sora_train.evaluate.metrics import REFERENCE, captions_of, open_held_out, real_videos, reference
from sora_train.export import export
from sora_train.launch.validation import validate
from sora_train.options import EvalOptions
from sora_train.quickstart.measure import measure_prompt_accuracy
from sora_train.quickstart.shapes import all_scenes
from sora_train.recipe import Recipe, check, load_recipe, save_recipe
from sora_train.sample import Run, load_run
from sora_train.video import read_mp4

LOSSES = ["holdout_loss", *(f"holdout_loss_{i}" for i in range(BINS)), "holdout_clips"]
BUCKET = "16x16x24"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in I3D's shapes, for what does not hang on what the features mean."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("i3d") / "random.safetensors"
    made = {name: torch.randn(shape) * (shape[0] and 0.05) for name, shape in shapes().items()}
    save_file({name: value.abs() + 1 if name.endswith("var") else value for name, value in made.items()}, file)
    return file


@pytest.fixture(scope="module")
def i3d(weights: Path) -> I3D:
    return load_i3d(weights)


def test_figures_are_those_asked_for_and_what_cannot_be_had_is_said(run: Run, weights: Path, tmp_path: Path):
    remarks: list[str] = []
    told: set[str] = set()
    ask = run.recipe.validation.model_copy(
        update={"holdout_clips": 5, "fvd": True, "fvd_clips": 2, "i3d": str(weights), "clip": f"{tmp_path}/nowhere"}
    )
    found = measure(run, ask, run.recipe.data.output, None, lambda what, done, of: told.add(what), remarks.append)
    assert list(found) == [*LOSSES, "fvd", "fvd_clips"]
    assert all(np.isfinite(value) for value in found.values())
    assert found["fvd"] > 0
    assert (found["holdout_clips"], found["fvd_clips"]) == (5, 2)
    assert [remark.split(":")[0] for remark in remarks] == ["similarity", "FVD is of 2 clips"]
    assert f"no folder '{tmp_path}/nowhere'" in remarks[0]
    assert told == {"held-out loss", "I3D of held-out clips", "samples of held-out captions, step"}
    again = measure(load_run(run.folder, device="cpu"), ask, run.recipe.data.output, remark=remarks.append)
    assert again == found
    assert measure(run, ask.model_copy(update={"fvd": False, "clip": "", "holdout_clips": 0}), "nowhere") == {}


def test_what_the_shards_lack_is_said_and_spoils_nothing_else(run: Run, tmp_path: Path):
    def said(run: Run, shards: str | Path, **asked: object) -> list[str]:
        remarks: list[str] = []
        ask = run.recipe.validation.model_copy(update=asked)
        assert measure(run, ask, shards, remark=remarks.append) == {}
        return remarks

    def with_data(**changed: object) -> Run:
        data = run.recipe.data.model_copy(update=changed)
        return dataclasses.replace(run, recipe=run.recipe.model_copy(update={"data": data}))

    shards = Path(run.recipe.data.output)
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"encoding_hash": "another"}))
    (remark,) = said(run, other)
    assert "encoding another" in remark
    assert "was trained on tiny" in remark
    assert "no manifest.json in" in said(run, tmp_path)[0]
    assert "data.holdout_fraction is 0" in said(with_data(holdout_fraction=0.0), shards)[0]
    assert "holds out none of the 48 clips" in said(with_data(holdout_fraction=1e-9), shards)[0]
    short = dataclasses.replace(run, manifest=run.manifest.model_copy(update={"frames": 15}))
    assert "clips have 15 frames" in said(short, shards, holdout_clips=0, fvd=True, i3d="x")[0]
    large = dataclasses.replace(run, manifest=run.manifest.model_copy(update={"height": 32}))
    assert "0 of the held-out clips are of 16x32x24" in said(large, shards, holdout_clips=0, fvd=True, i3d="x")[0]
    assert "can't be read" in said(run, shards, holdout_clips=0, fvd=True, i3d=str(tmp_path / "x"))[0]


def test_validation_and_eval_measure_the_same_similarity(run_folder: Path, clip_folder: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    recipe = load_recipe(folder / "recipe.yaml")
    asked = recipe.validation.model_copy(update={"clip": str(clip_folder), "holdout_clips": 0})
    save_recipe(recipe.model_copy(update={"validation": asked}), folder / "recipe.yaml")
    validate(folder / "checkpoints" / "step_00000020", folder)
    validated = json.loads((folder / "metrics.jsonl").read_text())["similarity"]
    evaluated = evaluate(folder, EvalOptions())["similarity"]
    assert validated == pytest.approx(evaluated, abs=0.01)  # H.264 moves it by more: see the next line
    from_files = [read_mp4(file) for file in sorted((folder / "samples" / "step_00000020").glob("*.mp4"))]
    coded = measure(load_run(folder, device="cpu"), asked, "", zip(asked.prompts, from_files, strict=True))
    assert abs(coded["similarity"] - evaluated) > 0.1


def test_pictures_that_training_leaves_out_are_left_out_of_the_loss(run: Run):
    everything = measure(run, run.recipe.validation, run.recipe.data.output)
    data = run.recipe.data.model_copy(update={"image_ratio": 0.0})
    videos = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"data": data}))
    rows = open_held_out(run, run.recipe.data.output).rows
    assert everything["holdout_clips"] == rows[BUCKET] + rows["1x16x16"]
    assert measure(videos, run.recipe.validation, run.recipe.data.output)["holdout_clips"] == rows[BUCKET]


def test_the_reference_is_of_the_vaes_own_frames_and_is_made_once(run: Run, i3d: I3D):
    shards = open_held_out(run, run.recipe.data.output)
    places = ranked(shards, (BUCKET,))[:2]
    (run.folder / REFERENCE).unlink(missing_ok=True)
    decoded = list(real_videos(run, shards, places, lambda done, of: None))
    for place, video in zip(places, decoded, strict=True):
        latents = torch.from_numpy(shards.read(BUCKET, [place.row]).latents[:, 0].astype(np.float32))
        direct = run.vae.decode(latents)[0].numpy().astype(int)
        assert np.abs(video - direct).max() <= 1  # normalised and back
    calls: list[int] = []
    first = reference(run, i3d, shards, places, lambda done, of: calls.append(done))
    assert np.array_equal(first, np.stack([i3d(torch.from_numpy(video)[None])[0].numpy() for video in decoded]))
    assert np.array_equal(reference(run, i3d, shards, places, lambda done, of: calls.append(done)), first)
    assert calls == [1, 2]
    (run.folder / REFERENCE).write_bytes(b"cut short")
    reference(run, i3d, shards, places[:1], lambda done, of: calls.append(done))
    assert calls == [1, 2, 1]


def test_fvd_of_a_run_that_always_had_given_frames_gives_them(run: Run, weights: Path):
    ask = run.recipe.validation.model_copy(
        update={"holdout_clips": 0, "fvd": True, "fvd_clips": 2, "i3d": str(weights)}
    )
    found = []
    for probability in (0.0, 0.5, 1.0):
        recipe = run.recipe.model_copy(update={"conditioning": ConditioningConfig(probability=probability)})
        found.append(measure(dataclasses.replace(run, recipe=recipe), ask, run.recipe.data.output)["fvd"])
    assert found[0] == found[1] != found[2]


def test_captions_come_with_the_embeddings_that_their_shards_have(run: Run):
    shards = open_held_out(run, run.recipe.data.output)
    prompts, embeddings = captions_of(run, shards, ranked(shards, (BUCKET,))[:100])
    assert len(set(prompts)) == len(prompts) == shards.rows[BUCKET]
    assert {prompt.split()[0] for prompt in prompts} == {"clip", "number"}
    for prompt, embedding in zip(prompts[:4], embeddings[:4], strict=True):
        assert torch.equal(embedding, run.text_encoder.encode([prompt])[0].half().float())


def test_the_command_prints_a_table_or_json_and_writes_the_same(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["eval", str(run_folder), "--holdout_clips", "4"]) == 0
    record = json.loads((run_folder / "eval.json").read_text())
    assert set(record) == {"run", "checkpoint", "weights", "shards", "remarks", *LOSSES}
    table, said = capsys.readouterr()
    assert f"written to {run_folder / 'eval.json'}\n" in said
    assert f"held-out loss   {record['holdout_loss']:>10.4f}" in table
    assert f"  900 to 1000   {record['holdout_loss_9']:>10.4f}" in table
    assert "- FVD: not asked for; name I3D's weights with --i3d FILE" in table
    out = tmp_path / "figures.json"
    assert cli.main(["eval", str(run_folder), "--holdout_clips", "4", "--json", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert json.loads(said) == json.loads(out.read_text()) == record


def test_what_the_flags_name_and_is_not_there_is_an_error_before_the_work(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["eval", str(run_folder), "--holdout_clips", "4", "--out", str(tmp_path / "eval.json")]
    none = str(tmp_path / "none")
    for more, says in [
        (["--i3d", none], f"--i3d: {none} can't be read (No such file or directory); name I3D's safetensors"),
        (["--clip", none], f"--clip: no folder '{none}'"),
        (["--shards", str(tmp_path)], f"--shards: no manifest.json in {tmp_path}"),
        (["--fvd_clips", "4"], "--fvd_clips: the run's validation.fvd is off"),
        (["--out", str(tmp_path)], f"{tmp_path} is a folder; name a file with --out"),
        (["--out", str(tmp_path / "no" / "eval.json")], "/no is no folder; name another file with --out"),
        (["--out", "/proc/eval.json"], "/proc/eval.json can't be written: "),  # where root may write, as it seems
    ]:
        assert cli.main([*(words[:-2] if "--out" in more else words), *more]) == cli.EXIT_FAILED
        said = capsys.readouterr()
        assert said.out == ""  # nothing was measured
        assert says in said.err
        assert not list(tmp_path.iterdir())
    assert cli.main(["eval", str(run_folder), "--fvd_clips", "1"]) == cli.EXIT_RECIPE
    with pytest.raises(UserError, match="no run at"):
        evaluate(tmp_path / "nothing", EvalOptions())


def test_an_evaluation_that_fails_keeps_what_an_earlier_one_wrote(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "eval.json").write_text("earlier")
    recipe = load_recipe(folder / "recipe.yaml")
    gone = recipe.data.model_copy(update={"output": str(tmp_path / "gone"), "holdout_fraction": 0.5})
    save_recipe(recipe.model_copy(update={"data": gone}), folder / "recipe.yaml")
    assert cli.main(["eval", str(folder)]) == cli.EXIT_FAILED
    said = capsys.readouterr().err
    assert "nothing could be measured, and nothing was written:\nheld-out loss: no manifest.json in" in said
    few = gone.model_copy(update={"output": recipe.data.output, "holdout_fraction": 1e-9})
    save_recipe(recipe.model_copy(update={"data": few}), folder / "recipe.yaml")
    with pytest.raises(UserError, match="held-out loss: .*\n.*eval.json was not written"):
        evaluate(
            folder,
            EvalOptions(holdout_clips=4),
            lambda run, captions, tell: {
                **dict.fromkeys(("colour", "direction", "shape", "all"), 1.0),
                "held_out": {"all": 1.0},
                "clips": 1,
            },
        )
    assert (folder / "eval.json").read_text() == "earlier"


def test_only_the_quickstarts_captions_are_judged(run: Run):
    assert measure_prompt_accuracy(run, []) is None
    assert measure_prompt_accuracy(run, [all_scenes()[0].caption, "water flows in a stream"]) is None


def test_a_recipe_that_asks_for_fvd_and_lacks_what_it_needs_is_refused():
    def wrong(**changed: dict) -> list[str]:
        settings = {
            "validation": {"fvd": True, "i3d": "i3d.safetensors"},
            "data": {"holdout_fraction": 0.1, "frames": 16},
        }
        return check(Recipe.model_validate({key: settings[key] | changed.get(key, {}) for key in settings}))

    assert wrong() == []
    assert "validation.i3d is empty" in wrong(validation={"i3d": ""})[0]
    assert "data.holdout_fraction is 0" in wrong(data={"holdout_fraction": 0.0})[0]
    assert "clips have 15 frames and I3D needs 16" in wrong(data={"frames": 15})[0]
    assert len(wrong(validation={"i3d": ""}, data={"holdout_fraction": 0.0, "frames": 8})) == 3


def test_an_export_has_the_figures_of_its_run(run_folder: Path, tmp_path: Path):
    shutil.copytree(run_folder, tmp_path / "run")
    recipe = load_recipe(run_folder / "recipe.yaml")
    save_recipe(recipe.model_copy(update={"diffusion": DiffusionConfig(kind="ddpm")}), tmp_path / "run" / "recipe.yaml")
    mine = load_run(tmp_path / "run", device="cpu")
    exported = load_run(export(tmp_path / "run", tmp_path / "pipeline"), device="cpu")
    assert exported.vae.hash != mine.vae.hash  # the latents' mean and deviation are folded into it
    ask = recipe.validation.model_copy(update={"holdout_clips": 4})
    found = measure(exported, ask, recipe.data.output)
    assert list(found.values()) == pytest.approx(list(measure(mine, ask, recipe.data.output).values()), rel=1e-5)
    shards = open_held_out(mine, recipe.data.output)
    places = ranked(shards, (BUCKET,))[:2]
    videos = [list(real_videos(made, shards, places, lambda done, of: None)) for made in (mine, exported)]
    assert np.abs(np.stack(videos[0]).astype(int) - np.stack(videos[1])).max() <= 1
