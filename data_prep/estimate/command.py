"""What `sora prep` would do, by the headers alone and a few clips: `sora prep RECIPE --plan`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from data_prep.buckets import buckets_of
from data_prep.estimate.estimate import Plan, cost, giving, reckon
from data_prep.estimate.measure import CAPTIONS, CLIPS, has_cluster, measure_on_cluster, spread, tokens_of
from data_prep.estimate.probe import is_large, survey
from data_prep.estimate.text import format_plan, judge
from data_prep.pipeline import check_shapes, encoding_differences, encoding_hash, find_codec, resolve_caption_cleaning
from data_prep.resume import check_folder
from data_prep.shards import read_stored_clips
from data_prep.sources import read_rows
from data_prep.workers import allocate_cpus, available_cpus
from sora_train.log import log
from sora_train.recipe import Recipe
from sora_train.terminal import print_result


def show_plan(recipe: Recipe) -> None:
    """Prints the plan; then raises UserError or RecipeError where it comes to nothing, or a bucket stays empty."""
    found = plan(recipe)
    print_result(format_plan(found))
    judge(found, recipe.data)


def plan(recipe: Recipe) -> Plan:
    """Opens every source's header, and decodes and encodes a few clips.

    Raises UserError where captions, networks or the shards in `data.output` are no good, as `prep` does; `judge` says
    what is wrong with a plan.
    """
    from sora_train.ray_cluster.connection import connect

    recipe = resolve_caption_cleaning(recipe)
    data = recipe.data
    vae, text = find_codec(recipe)
    check_shapes(buckets_of(data), vae)
    rows = read_rows(data)
    held, _ = read_stored_clips(data.output, encoding_hash(recipe, vae, text), encoding_differences(recipe, vae, text))
    check_folder(data, rows, held)
    joined = is_large(rows, data) or has_cluster(recipe.cluster.address)
    with connect(recipe.cluster.address, log_to_driver=False) if joined else nullcontext():
        looks = survey(rows, data, recipe.selection)
        tokens = tokens_of(text, recipe.codec.max_tokens, recipe.codec.caption_cleaning)
        draft = reckon(recipe, rows, looks, vae, text.width, tokens)
        good = sorted(giving(rows, looks), key=lambda row: sorted(looks[row.path].clips))  # bucket by bucket
        if not good:
            return draft
        log.info(f"plan: {len(looks)} files opened; now a few clips are encoded, to see how long they take")
        captions = spread(sorted({caption for row in good for caption in row.captions}), CAPTIONS)
        measured = measure_on_cluster(recipe, spread(good, CLIPS), captions)
    if not measured:
        return draft
    allocation = allocate_cpus(available_cpus(), 0, recipe.prep)
    loads = (allocation.vae.workers + allocation.text.workers) / available_cpus() if measured.device == "cpu" else 1.0
    return replace(draft, work=cost(draft, buckets_of(data), measured, loads))
