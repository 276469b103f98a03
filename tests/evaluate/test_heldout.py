"""The held-out loss is what one computes by hand, on clips that training never sees, however they are batched."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_train.data.order import batch
from sora_train.data.shards import ShardSet
from sora_train.diffusion import ConditioningConfig, DiffusionConfig, make_objective
from sora_train.evaluate.heldout import BINS, choose_clips, held_out_flops, held_out_loss, ranked, time_in
from sora_train.evaluate.metrics import open_held_out
from sora_train.model.flops import forward_flops
from sora_train.sample import Run, load_run


@pytest.fixture(scope="module")
def shards(run: Run) -> ShardSet:
    return open_held_out(run, run.recipe.data.output)


def losses(run: Run, shards: ShardSet, batch_size: int | None, count: int = 100) -> list[float]:
    found = held_out_loss(run.predict, run.objective, shards, ranked(shards)[:count], batch_size=batch_size)
    assert list(found) == ["holdout_loss", *(f"holdout_loss_{i}" for i in range(BINS))]
    return list(found.values())


def test_the_loss_is_the_same_for_batches_of_one_and_of_seven(run: Run, shards: ShardSet):
    assert len(shards.rows) == 2  # clips and pictures
    alone = losses(run, shards, 1)
    assert losses(run, shards, 7) == pytest.approx(alone, rel=1e-6)
    assert losses(run, shards, None) == pytest.approx(alone, rel=1e-6)
    assert losses(run, shards, 7, count=9) == losses(run, shards, 7, count=9) != losses(run, shards, 7)


def test_the_loss_in_bf16_is_that_in_float32_within_a_hundredth(run: Run, run_folder: Path, shards: ShardSet):
    half = load_run(run_folder, device="cpu", dtype=torch.bfloat16)
    places = ranked(shards)[:100]
    exact, found = (held_out_loss(each.predict, run.objective, shards, places) for each in (run, half))
    assert found == pytest.approx(exact, rel=1e-2)
    assert found != exact


def test_its_work_is_a_forward_pass_in_each_bin_of_each_clip(run: Run, shards: ShardSet):
    places = ranked(shards)
    shapes = [shards.read(place.bucket, [place.row]).latents.shape[-4:] for place in places]
    one = [forward_flops(run.model.config, f, h, w, shards.manifest.text.max_tokens) for f, _, h, w in shapes]
    assert held_out_flops(run.model.config, shards, places) == BINS * sum(one)


def test_the_loss_equals_one_computed_by_hand_of_what_the_model_was_given(run: Run, shards: ShardSet):
    given: list[tuple[torch.Tensor, ...]] = []

    def model(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        given.append((x, t, text, mask))
        return torch.zeros_like(x)

    places = sorted(ranked(shards))
    found = held_out_loss(model, run.objective, shards, places, batch_size=1)
    assert len(given) == BINS * len(places)
    hand, mean, std = np.zeros(BINS), *(values.numpy()[:, None, None] for values in (run.vae.mean, run.vae.std))
    for i, place in enumerate(places):
        clip = shards.read(place.bucket, [place.row])
        moments, seen = clip.latents[0].astype(np.float64), given[BINS * i : BINS * (i + 1)]
        # Two times of one clip and one noise give the noise and the draw back: x_t = (1 - t) x + t noise.
        times = [float(t) / 1000 for _, t, _, _ in seen]
        assert [int(BINS * t) for t in times] == list(range(BINS))
        first, last = (x[0].double().numpy() for x, *_ in (seen[0], seen[-1]))
        velocity = (last - first) / (times[-1] - times[0])
        data, noise = first - times[0] * velocity, first + (1 - times[0]) * velocity
        drawn = (data * std + mean - moments[0]) / np.exp(0.5 * moments[1])
        for standard in (drawn, noise):
            assert abs(standard.mean()) < 5 / np.sqrt(standard.size)
            assert standard.std() == pytest.approx(1, abs=5 / np.sqrt(2 * standard.size))
        assert abs(np.corrcoef(drawn.ravel(), noise.ravel())[0, 1]) < 5 / np.sqrt(noise.size)
        text, mask = seen[0][2][0], seen[0][3][0]
        assert any(np.array_equal(text[mask].numpy(), caption.astype(np.float32)) for caption in clip.text[0])
        hand += np.square(noise - data).mean()
    assert [found[f"holdout_loss_{i}"] for i in range(BINS)] == pytest.approx(hand / len(places), rel=1e-5)
    assert found["holdout_loss"] == pytest.approx(hand.mean() / len(places), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift": 3.0},
        *({"kind": "ddpm", "prediction": p, "min_snr_gamma": 5.0} for p in ("epsilon", "v", "sample")),
    ],
)
def test_a_model_that_predicts_exactly_has_no_loss_and_no_weights_count(shards: ShardSet, settings: dict):
    objective = make_objective(DiffusionConfig(**settings))
    targets: list[torch.Tensor] = []
    add_noise = objective.add_noise

    def remembered(
        x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, given: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_t, target = add_noise(x, noise, t)
        targets.append(target)
        return x_t, target

    objective.add_noise = remembered  # an oracle: the model is handed what it has to predict
    places = ranked(shards)[:5]
    exact = held_out_loss(lambda x, t, text, mask: targets[-1], objective, shards, places)
    assert set(exact.values()) == {0.0}
    wrong = held_out_loss(lambda x, t, text, mask: targets[-1] + 0.5, objective, shards, places)
    assert list(wrong.values()) == pytest.approx([0.25] * (BINS + 1), rel=1e-5)


def test_given_frames_are_shown_clean_and_not_counted(run: Run, shards: ShardSet):
    places = [place for place in ranked(shards) if not place.bucket.startswith("1x")][:12]
    shown: dict[float, set[float]] = {}
    for probability in (0.0, 0.5, 1.0):
        objective = make_objective(DiffusionConfig(), conditioning=ConditioningConfig(probability=probability))
        given: list[tuple[torch.Tensor, torch.Tensor]] = []

        def model(x: torch.Tensor, t: torch.Tensor, *text: torch.Tensor, given: list = given) -> torch.Tensor:
            given.append((x, t))
            wrong = torch.zeros_like(x)
            if t.ndim == 2:
                wrong[:, 0] = 1e6 * (t[:, 0] == 0)[:, None, None, None]  # not counted
            return wrong

        found = held_out_loss(model, objective, shards, places, batch_size=1)
        assert all(value < 10 for value in found.values())
        clips = [given[BINS * i : BINS * (i + 1)] for i in range(len(places))]
        clean = [t.ndim == 2 and not t[0, 0] for _, t in given[::BINS]]
        for is_given, seen in zip(clean, clips, strict=True):
            assert all((t[0, 0] == 0) == is_given for _, t in seen if t.ndim == 2)  # one draw for all bins
            assert all(torch.equal(x[:, :1], seen[0][0][:, :1]) == is_given for x, _ in seen[1:])
        shown[probability] = sum(clean) / len(places)
    assert shown[0.0] == 0 < shown[0.5] < 1 == shown[1.0]


def test_a_learned_variance_is_left_aside(run: Run, shards: ShardSet):
    objective = make_objective(DiffusionConfig(kind="ddpm"), learned_variance=True)
    places = ranked(shards)[:4]
    plain = held_out_loss(lambda x, t, text, mask: x, objective, shards, places)
    both = held_out_loss(lambda x, t, text, mask: torch.cat([x, 7 * x], dim=2), objective, shards, places)
    assert both == plain


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_every_time_lies_in_its_bin_also_at_the_ends(kind: str):
    objective = make_objective(DiffusionConfig(kind=kind))  # pyright: ignore[reportArgumentType]
    within = torch.tensor([0.0, 0.5, 1 - 2**-25, 1.0])
    for number in range(BINS):
        times = objective.model_time(time_in(objective, number, within))
        assert (times >= 100 * number).all()
        assert (times < 100 * (number + 1)).all()
        assert times.max() <= 1000 if kind == "flow" else times.max() <= 999


def test_no_clip_is_of_the_split_that_training_takes(run: Run, shards: ShardSet):
    train = ShardSet(run.recipe.data.output, run.recipe.data.holdout_fraction, "train")
    order = train.sample_order(4, seed=0)
    taken = [batch(order, k) for k in range(order.steps_per_epoch)]
    trained = {clip for b in taken for clip in train.read(b.bucket, b.rows).sample_ids}
    held_out = {place.sample_id for place in ranked(shards)[:100]}
    assert len(trained | held_out) == 48
    assert held_out
    assert not trained & held_out


def test_fewer_clips_are_a_part_of_more_and_each_is_where_its_id_says(shards: ShardSet):
    everything = ranked(shards)[:100]
    assert len(everything) == sum(shards.rows.values())
    few = ranked(shards)[:5]
    assert len(few) == 5
    assert set(few) <= set(ranked(shards)[:9]) <= set(everything)
    assert all(place.bucket == "1x16x16" for place in ranked(shards, ("1x16x16",)))
    for place in everything:
        assert shards.read(place.bucket, [place.row]).sample_ids == [place.sample_id]


def test_added_clips_leave_the_measured_set_as_it_is_and_removed_ones_are_said(run: Run, shards: ShardSet, tmp_path):
    said: list[str] = []
    mine = replace(run, folder=tmp_path)
    (tmp_path / "checkpoints").mkdir()

    def chosen(of: ShardSet, count: int) -> set[str]:
        return {place.sample_id for place in choose_clips(mine, of, count, None, "held-out loss", said.append)}

    everything = [place.sample_id for place in ranked(shards)]
    later = Subset(shards, everything[3:])  # the first by hash come into the shards later
    before = chosen(later, 4)
    assert before == set(everything[3:7])
    assert chosen(shards, 4) == before
    assert chosen(shards, 2) < before < chosen(shards, 6)
    assert not said
    after = chosen(Subset(shards, [name for name in everything if name != everything[3]]), 4)
    assert len(after & before) == 3
    assert len(after) == 4
    assert "1 of the 4 clips that it was measured on are no longer held out" in said[0]


class Subset(ShardSet):
    """A held-out split without some of its clips."""

    def __init__(self, shards: ShardSet, ids: list[str]):
        super().__init__(shards.folder, shards.holdout_fraction, "holdout")
        self.ids = set(ids)

    def all_sample_ids(self, bucket: str) -> list[str]:
        return [name for name in super().all_sample_ids(bucket) if name in self.ids]
