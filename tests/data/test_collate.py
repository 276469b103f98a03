"""What chance adds to a clip depends on the seed, the step and the clip, and on nothing else."""

import base64
import math
import threading
from functools import partial

import numpy as np
import pytest
import torch

from sora_train.data.collate import (
    PAD_TOKENS,
    MicroBatch,
    collate,
    draw_posterior,
    draw_training_noise,
    pad_text,
    padded_lengths,
)
from sora_train.data.loader import batches, micro_batches
from sora_train.data.order import Batch, SampleOrder, batch, share
from sora_train.data.shards import ShardSet
from sora_train.diffusion import ConditioningConfig, DiffusionConfig, make_objective
from sora_train.errors import UserError
from sora_train.schema import Clips

BUCKET = "3x16x24"
FLOW = make_objective(DiffusionConfig())
GIVEN = make_objective(DiffusionConfig(), conditioning=ConditioningConfig(frames=2, probability=0.5))


def steps_of(shards: ShardSet, order: SampleOrder, world: int, micro: int, step: int) -> list[MicroBatch]:
    """The micro-batches of all ranks at a step."""
    return [
        made
        for rank in range(world)
        for made in micro_batches(
            shards, order, GIVEN, step, rank=rank, world=world, micro_batch_size=micro, caption_dropout=0.3
        )
    ]


def by_sample(made: list[MicroBatch]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Everything about each clip, its text cut to its own tokens; padding left out."""
    return {
        sample_id: (
            part.latents[i],
            part.noise[i],
            part.t[i],
            part.text[i][part.text_mask[i]],
            part.weight[i],
            part.dropped[i],
            part.given[i],
        )
        for part in made
        for i, sample_id in enumerate(part.sample_ids)
        if sample_id is not None
    }


@pytest.mark.parametrize("step", [0, 2, 4])  # 2 is short: 2 clips
@pytest.mark.parametrize(("world", "micro"), [(1, 4), (1, 1), (2, 2), (2, 1), (3, 1), (4, 1), (1, 3)])
def test_a_global_batch_holds_the_same_however_it_is_cut(make_shards, step: int, world: int, micro: int):
    shards = ShardSet(make_shards(40, 2))
    order = shards.sample_order(20, seed=3)
    expected = by_sample(steps_of(shards, order, 1, 20, step))
    found = by_sample(steps_of(shards, order, world, micro, step))
    assert list(found) == list(expected)
    assert len(found) == len(batch(order, step).rows)
    for sample_id, values in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found[sample_id], values, strict=True))


def test_padding_repeats_a_clip_with_weight_zero(make_shards):
    shards = ShardSet(make_shards(2))
    order = shards.sample_order(8, seed=0)
    ranks = [
        micro_batches(shards, order, FLOW, 0, rank=r, world=3, micro_batch_size=2, caption_dropout=0.0)
        for r in range(3)
    ]
    assert {len(rank) for rank in ranks} == {1}
    parts = [part for rank in ranks for part in rank]
    assert all(len(part.latents) == 2 for part in parts)
    assert sum(part.weight.sum().item() for part in parts) == 2
    for part in parts:
        assert [sample_id is None for sample_id in part.sample_ids] == (part.weight == 0).tolist()
        assert torch.equal(part.latents[0], part.latents[1])
    assert sum(part.weight.sum().item() == 0 for part in parts) == 1


def test_other_steps_seeds_and_clips_draw_otherwise(make_shards):
    clips = ShardSet(make_shards(4)).read(BUCKET, range(4))
    draws = [
        draw_training_noise(clips, row, FLOW, seed, step, 0.1)
        for row in range(4)
        for seed in range(3)
        for step in range(3)
    ]
    assert len({drawn.t.item() for drawn in draws}) == len(draws)
    assert len({drawn.noise.sum().item() for drawn in draws}) == len(draws)


def test_given_frames_are_drawn_last_so_that_all_else_is_as_without(make_shards):
    shards = ShardSet(make_shards(40))
    clips = shards.read(BUCKET, range(40))
    how = {"manifest": shards.manifest, "seed": 3, "step": 5, "caption_dropout": 0.3}
    made, plain = (collate(clips, 0, objective=objective, **how) for objective in (GIVEN, FLOW))
    assert plain.given is None
    for name in ("latents", "noise", "t", "text", "text_mask", "dropped"):
        assert torch.equal(getattr(made, name), getattr(plain, name))
    assert set(made.given.tolist()) == {0, 2}


def clips_of(f: int) -> Clips:
    """100 clips of f latent frames."""
    ids = [f"{i}" for i in range(100)]
    latents, text = np.zeros((100, 1, f, 1, 1, 1), np.float16), [[np.zeros((1, 2), np.float16)]] * 100
    return Clips(ids, ids, [["one"]] * 100, latents, text)


def test_first_frames_are_given_to_the_asked_share_and_never_to_all_of_a_clip():
    for probability in (0.2, 1.0):
        config = ConditioningConfig(frames=2, probability=probability)
        objective = make_objective(DiffusionConfig(), conditioning=config)
        drawn = {
            f: [draw_training_noise(clips_of(f), row, objective, 0, step, 0.1).given
                for step in range(20) for row in range(100)]
            for f in (1, 2, 3)
        }  # fmt: skip
        assert not any(drawn[1] + drawn[2])
        assert set(drawn[3]) <= {0, 2}
        assert drawn[3].count(2) == pytest.approx(2000 * probability, abs=4 * math.sqrt(2000 * 0.2 * 0.8))
        assert probability < 1 or drawn[3].count(2) == 2000


def test_noise_and_posterior_draws_have_their_mean_and_variance():
    generator = torch.Generator().manual_seed(0)
    moments = torch.stack([torch.full((8, 4, 32, 32), 1.5), torch.full((8, 4, 32, 32), math.log(0.25))])
    drawn = draw_posterior(moments, generator)
    assert drawn.mean().item() == pytest.approx(1.5, abs=4 * 0.5 / math.sqrt(drawn.numel()))
    assert drawn.std().item() == pytest.approx(0.5, rel=0.02)
    clips = Clips(["a"], ["a"], [["a"]], np.zeros((1, 1, 8, 4, 32, 32), np.float16), [[np.zeros((1, 6), np.float16)]])
    noise = draw_training_noise(clips, 0, FLOW, 0, 0, 0.0).noise
    assert noise.mean().item() == pytest.approx(0, abs=4 / math.sqrt(noise.numel()))
    assert noise.std().item() == pytest.approx(1, rel=0.02)


def test_latents_without_a_posterior_are_normalised_per_channel(make_shards):
    shards = ShardSet(make_shards(5, moments=1))
    clips = shards.read(BUCKET, range(5))
    made = collate(clips, 0, manifest=shards.manifest, objective=FLOW, seed=0, step=0, caption_dropout=0.0)
    for channel, (mean, std) in enumerate(((0, 1), (1, 2), (2, 4), (3, 8))):
        raw = torch.from_numpy(clips.latents[:, 0, :, channel].astype(np.float32))
        assert torch.equal(made.latents[:, :, channel], (raw - mean) / std)


def test_text_is_a_caption_or_the_empty_one_with_masked_padding(make_shards):
    shards = ShardSet(make_shards(30))
    clips = shards.read(BUCKET, range(30))
    made = collate(clips, 0, manifest=shards.manifest, objective=FLOW, seed=0, step=0, caption_dropout=0.3)
    empty = torch.from_numpy(shards.manifest.null_embedding("eos").copy())
    assert 0 < made.dropped.sum() < 30
    for row in range(30):
        text = made.text[row][made.text_mask[row]]
        assert not made.text[row][~made.text_mask[row]].any()
        choices = [torch.from_numpy(caption.copy()) for caption in clips.text[row]]
        assert any(torch.equal(text, choice) for choice in ([empty] if made.dropped[row] else choices))
    assert made.text_mask.sum(1).max() == 5
    assert made.text.shape[1] == 9  # the shards' longest caption


def test_a_dropped_caption_becomes_a_null_prompt_of_its_length(make_shards):
    shards = ShardSet(make_shards(30))
    clips = shards.read(BUCKET, range(30))
    width = shards.manifest.text.width
    tokens = np.stack([np.full(width, value, np.float16) for value in (0.5, -2.0)])
    text = base64.b64encode(tokens.tobytes()).decode()
    manifest = shards.manifest.model_copy(update={"empty_text": text, "empty_tokens": 2})
    how = {"manifest": manifest, "objective": FLOW, "seed": 0, "step": 3}
    kept = collate(clips, 0, **how, caption_dropout=0.0, null_prompt="padded")
    made = collate(clips, 0, **how, caption_dropout=0.5, null_prompt="padded")
    assert len(set(kept.text_mask.sum(1).tolist())) > 2  # captions of several lengths
    assert torch.equal(made.text_mask, kept.text_mask)
    for row, dropped in enumerate(made.dropped.tolist()):
        values = [0.5] + [-2.0] * (int(kept.text_mask[row].sum()) - 1)
        null = torch.tensor(values, dtype=torch.float16)[:, None].expand(-1, width)
        expected = null if dropped else kept.text[row][kept.text_mask[row]]
        assert torch.equal(made.text[row][made.text_mask[row]], expected)
    single = collate(clips, 0, **how, caption_dropout=1.0, null_prompt="eos")
    assert torch.equal(single.text[single.text_mask], torch.full((30, width), 0.5, dtype=torch.float16))


def test_captions_are_dropped_per_clip_and_drawn_evenly():
    captions = [["one", "two", "three"]] * 100
    ids = [f"{i}" for i in range(100)]
    text = [[np.zeros((1, 2), np.float16)] * 3] * 100
    clips = Clips(ids, ids, captions, np.zeros((100, 1, 1, 1, 1, 1), np.float16), text)
    draws = [draw_training_noise(clips, row, FLOW, 0, step, 0.1) for step in range(100) for row in range(100)]
    drawn = np.array([np.nan if one.dropped else one.caption for one in draws], float)
    drawn = drawn.reshape(100, 100)  # step, clip; NaN is dropped
    dropped = np.isnan(drawn)
    assert abs(dropped.sum() - 1000) < 3 * math.sqrt(10_000 * 0.1 * 0.9)
    for axis in (0, 1):  # independent over the clips of a step, and over the steps of a clip: binomial, sigma 3
        drops = dropped.sum(axis)
        assert abs(drops - 10).max() < 5 * 3
        assert drops.var(ddof=1) == pytest.approx(9, abs=3 * 9 * math.sqrt(2 / 99))
    for caption in range(3):
        assert abs((drawn == caption).sum() - 3000) < 3 * math.sqrt(10_000 * 0.3 * 0.7)


def test_no_caption_or_every_caption_is_dropped_at_the_ends(make_shards):
    shards = ShardSet(make_shards(30))
    clips = shards.read(BUCKET, range(30))
    for fraction, expected in ((0.0, 0), (1.0, 30)):
        made = collate(clips, 0, manifest=shards.manifest, objective=FLOW, seed=0, step=0, caption_dropout=fraction)
        assert made.dropped.sum() == expected


def test_the_loaders_thread_equals_the_plain_function(make_shards):
    shards = ShardSet(make_shards(20))
    order = shards.sample_order(8, seed=0)
    make = partial(micro_batches, shards, order, FLOW, rank=1, world=2, micro_batch_size=2, caption_dropout=0.1)
    found = list(batches(make, range(2, 9)))
    assert [step for step, _ in found] == list(range(2, 9))
    for step, made in found:
        for a, b in zip(made, make(step), strict=True):
            assert a.sample_ids == b.sample_ids
            assert torch.equal(a.latents, b.latents)
            assert torch.equal(a.noise, b.noise)


def test_an_error_of_the_thread_reaches_the_loop_at_its_step(make_shards, tmp_path):
    shards = ShardSet(make_shards(60, 4), cache_bytes=0)
    order = shards.sample_order(4, seed=0)
    first_bad = next(k for k in range(16) if max(batch(order, k).rows) >= 60)
    (tmp_path / "shards" / f"bucket={BUCKET}" / "0001.parquet").unlink()
    shards._open_file.cache_clear()
    made = batches(partial(micro_batches, shards, order, FLOW, micro_batch_size=4, caption_dropout=0.1), range(16))
    assert first_bad > 0
    assert [next(made)[0] for _ in range(first_bad)] == list(range(first_bad))
    with pytest.raises(UserError, match=r"0001\.parquet"):
        next(made)
    for thread in data_threads():
        thread.join(timeout=30)
    assert not data_threads()


def test_a_loop_that_stops_early_ends_the_thread(make_shards):
    shards = ShardSet(make_shards(20))
    order = shards.sample_order(4, seed=0)
    made = batches(partial(micro_batches, shards, order, FLOW, micro_batch_size=4, caption_dropout=0.1), iter(int, 1))
    assert next(made)[0] == 0  # of endless steps
    thread, *others = data_threads()
    assert not others
    made.close()
    assert list(made) == []
    thread.join(timeout=30)
    assert not data_threads()


def test_batches_that_are_not_begun_are_given_up_when_the_loop_stops(make_shards):
    shards = ShardSet(make_shards(20))
    numbers, order = range(20_000), shards.sample_order(20, seed=0)  # a minute of work
    make = partial(micro_batches, shards, order, FLOW, micro_batch_size=20, caption_dropout=0.1)
    made = batches(make, numbers, ahead=len(numbers) - 1)
    assert next(made)[0] == 0
    (thread,) = data_threads()
    made.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_every_clip_comes_once_an_epoch_when_the_world_changes(make_shards):
    shards = ShardSet(make_shards(40, 25))
    order = shards.sample_order(6, seed=1)
    seen = [
        sample_id
        for step in range(order.steps_per_epoch, 2 * order.steps_per_epoch)
        for sample_id in by_sample(steps_of(shards, order, world=1 + step % 4, micro=1 + step % 2, step=step))
    ]
    assert sorted(seen) == [f"{number:08x}" for number in range(65)]


def test_share_of_a_short_batch_leaves_late_ranks_with_padding():
    assert share(Batch(0, BUCKET, (4, 9)), 0, 2, 2) == [[4, None]]
    assert share(Batch(0, BUCKET, (4, 9)), 1, 2, 2) == [[9, None]]
    assert [share(Batch(0, BUCKET, (4,)), rank, 2, 1) for rank in range(2)] == [[[None]], [[4]]]


def test_padding_is_masked_zeros():
    short, long = torch.ones(1, 4), torch.ones(3, 4)
    text, mask = pad_text([short, long])
    assert text.shape == (2, PAD_TOKENS, 4)
    assert mask.sum(1).tolist() == [1, 3]
    assert mask[0].tolist() == [True] + [False] * (PAD_TOKENS - 1)
    assert mask[1, :3].all()
    assert text[~mask].abs().sum() == 0
    torch.testing.assert_close(text[mask], torch.ones(4, 4))


@pytest.mark.parametrize("most", [4, 32, 77, 120, 256])
def test_captions_of_any_length_are_padded_to_a_few_lengths(most: int):
    shapes = {pad_text([torch.ones(length, 2)], most)[0].shape[1] for length in range(1, most + 1)}
    assert sorted(shapes) == padded_lengths(most)
    assert len(shapes) == -(-most // PAD_TOKENS)
    assert max(shapes) == most
