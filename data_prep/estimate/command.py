"""`sora prep RECIPE --plan`: clips, bytes and hours from headers and a few measured clips. No cluster is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from data_prep.estimate.estimate import PrepEstimate, estimate, usable_rows
from data_prep.estimate.measure import CAPTIONS, CLIPS, measure
from data_prep.estimate.probe import pick_evenly, probe_files
from data_prep.estimate.table import check_estimate, format_estimate
from data_prep.pipeline import check_shapes, encoding_differences, encoding_hash, find_codec, resolve_caption_cleaning
from data_prep.resume import check_output_folder
from data_prep.shards import read_stored_clips
from data_prep.sources import read_rows
from sora_train.codec import CodecConfig
from sora_train.codec.conventions import clean
from sora_train.codec.files import TextFiles
from sora_train.log import log
from sora_train.recipe import Recipe
from sora_train.terminal import print_result


def show_plan(recipe: Recipe) -> None:
    """Prints the estimate. Raises UserError or RecipeError if prep or training could only fail."""
    found = estimate_prep(recipe)
    print_result(format_estimate(found, recipe))
    check_estimate(found, recipe.data)


def estimate_prep(recipe: Recipe) -> PrepEstimate:
    """Opens the headers of a sample of the sources, and decodes and encodes a few clips.

    Raises UserError as `prep` does if captions, networks or the shards in `data.output` are unusable.
    """
    recipe = resolve_caption_cleaning(recipe)
    data = recipe.data
    vae, text = find_codec(recipe)
    check_shapes(data, vae)
    rows = read_rows(data)
    key, differences = encoding_hash(recipe, vae, text), encoding_differences(recipe, vae, text)
    check_output_folder(data, rows, read_stored_clips(data.output, key, differences)[0])
    probes = probe_files(rows, data, recipe.selection)
    found = estimate(recipe, rows, probes, vae, text.width, token_counter(text, recipe.codec))
    good = sorted(usable_rows(rows, probes), key=lambda row: sorted(probes[row.path].clips))  # bucket by bucket
    if not good:
        return found
    log.info(f"plan: {len(probes)} files opened; now a few clips are encoded, to see how long they take")
    captions = pick_evenly(sorted({caption for row in good for caption in row.captions}), CAPTIONS)
    return replace(found, measured=measure(recipe, pick_evenly(good, CLIPS), captions))


def token_counter(text: TextFiles, codec: CodecConfig) -> Callable[[list[str]], list[int]]:
    """A function that counts the tokens of captions as the text encoder gets them."""

    def count(captions: list[str]) -> list[int]:
        from sora_train.codec.text import load_tokenizer

        if not captions:
            return []
        cleaned = [clean(caption, codec.caption_cleaning) for caption in captions]
        ids = load_tokenizer(text.tokenizer)(cleaned, truncation=True, max_length=codec.max_tokens)["input_ids"]
        return [len(tokens) for tokens in ids]  # pyright: ignore[reportArgumentType]

    return count
