"""What is checked before a run starts, so that it fails at once with the numbers and the remedy, not hours later."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import ray

from sora_train.codec import CodecConfig
from sora_train.codec.conventions import cleaning_of, null_prompt_of
from sora_train.codec.files import find_text_encoder, find_vae
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.evaluate.i3d import load_i3d
from sora_train.evaluate.similarity import find_clip
from sora_train.launch.init_from import find_initial_weights
from sora_train.launch.resume import saved_null_prompt
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe
from sora_train.schema import bucket_name, bucket_size
from sora_train.settings import read_yaml
from sora_train.storage import reject_job_dir
from sora_train.train import checkpoint


def resolve_recipe(recipe: Recipe, fresh: bool = False) -> Recipe:
    """The recipe with its local folders made absolute: workers and validations have other working folders.

    `model.init_from` becomes the folder of the weights, fetched for a hub id; a run that is resumed, and not made anew
    (`fresh`), has the one that it began with.
    """
    if "://" in recipe.train.output:
        raise UserError(
            f"train.output {recipe.train.output} is remote; name a folder that every node sees, such as one on NFS"
        )

    reject_job_dir("data.output", recipe.data.output)
    reject_job_dir("train.output", recipe.train.output)

    def place(name: str) -> str:
        return name if "://" in name else os.path.abspath(os.path.expanduser(name))

    def network(name: str) -> str:
        return place(name) if os.path.isdir(os.path.expanduser(name)) and name != "builtin" else name

    run = Path(place(recipe.train.output)) / recipe.name
    begun = run if not fresh and (run / "recipe.yaml").is_file() and checkpoint.whole(run / "checkpoints") else None
    start = _initial_weights(recipe, begun)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"output": place(recipe.data.output)}),
            "validation": recipe.validation.model_copy(
                update={
                    "i3d": recipe.validation.i3d and place(recipe.validation.i3d),
                    "clip": network(recipe.validation.clip),
                }
            ),
            "codec": recipe.codec.model_copy(
                update={key: network(getattr(recipe.codec, key)) for key in ("vae", "text", "models")}
                | _text_settings(recipe.codec, start, begun)
            ),
            "model": replace(recipe.model, init_from=start),
            "train": recipe.train.model_copy(update={"output": place(recipe.train.output)}),
        }
    )


def _initial_weights(recipe: Recipe, begun: Path | None) -> str:
    if begun is not None:
        return str((read_yaml(begun / "recipe.yaml").get("model") or {}).get("init_from", ""))
    return find_initial_weights(recipe)


def _text_settings(codec: CodecConfig, start: str, begun: Path | None) -> dict[str, str]:
    """What `auto` stands for. The cleaning of captions is what the shards have, unless weights of others are read."""
    if begun is not None:
        stated = codec.null_prompt != "auto"
        return {"null_prompt": codec.null_prompt if stated else saved_null_prompt(begun)}
    cleaning = cleaning_of(codec, start) if start else codec.caption_cleaning
    return {"caption_cleaning": cleaning, "null_prompt": null_prompt_of(codec, start)}


def check_shards(recipe: Recipe) -> Manifest:
    """The manifest of shards that are there and fit the model."""
    shards = ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train")
    manifest, model = shards.manifest, recipe.model
    wrong = []
    if manifest.vae.channels != model.in_channels:
        wrong.append(
            f"model.in_channels is {model.in_channels} and the shards have {manifest.vae.channels} latent channels: "
            f"set model.in_channels to {manifest.vae.channels}"
        )
    if manifest.text.width != model.text_width:
        wrong.append(
            f"model.text_width is {model.text_width} and the shards' embeddings are {manifest.text.width} wide: set "
            f"model.text_width to {manifest.text.width}"
        )
    asked = [bucket_name(*shape) for shape in recipe.data.shapes]
    there = [name for name, count in manifest.buckets.items() if count or name in asked]
    if set(asked) != set(there):
        remedy = f"data.buckets to [{', '.join(there)}]"
        if not recipe.data.buckets and len(there) == 1:
            remedy = "data.frames to {}, data.height to {} and data.width to {}".format(*bucket_size(there[0]))
        wrong.append(
            f"the recipe asks for clips of {', '.join(asked)} and the shards hold {', '.join(there)}: set {remedy}; or "
            "set data.output to another folder and run `sora prep` to make the clips"
        )
    for name in there:
        _, _, h, w = manifest.vae.latent_shape(*bucket_size(name))
        if h % model.patch or w % model.patch:
            wrong.append(
                f"model.patch {model.patch} does not divide the {h}x{w} latents of the bucket {name}: set model.patch "
                "to 1, or change the bucket's height and width"
            )
    if wrong:
        raise UserError(f"{recipe.data.output} does not fit the recipe: {'; '.join(wrong)}")
    if empty := [name for name in there if not manifest.buckets[name]]:
        raise UserError(
            f"{recipe.data.output} has no clip in the buckets {', '.join(empty)} that the recipe asks for; "
            "`sora prep RECIPE --plan` says why. Add clips that fill them, or take them out of data.buckets"
        )
    shards.plan(recipe.train.batch_size, recipe.train.seed, recipe.data.image_ratio)  # what is held out may lack
    return manifest


def check_codec(recipe: Recipe, manifest: Manifest) -> None:
    """UserError where the run could not draw samples: its networks are not those of the shards, or, with validation
    on, out of reach.
    """
    for key, name, find, facts in (
        ("codec.vae", recipe.codec.vae, find_vae, manifest.vae),
        ("codec.text", recipe.codec.text, find_text_encoder, manifest.text),
    ):
        if name == facts.name and not recipe.validation.every:
            continue
        files = find(name, recipe.codec.models)
        if name != facts.name and files.hash != facts.hash:
            raise UserError(
                f"{key} {name!r} is not what {recipe.data.output} was encoded with ({facts.name!r}), so that samples "
                f"would be wrong; give the same as for `sora prep`: --{key} {facts.name}"
            )


def check_text(recipe: Recipe, manifest: Manifest) -> None:
    """UserError where the shards' captions are not what the model is to be given, or they lack its null prompt."""
    wanted, there = recipe.codec.caption_cleaning, manifest.text.caption_cleaning
    if wanted not in ("auto", there):
        raise UserError(
            f"codec.caption_cleaning is {wanted}, but {recipe.data.output} was encoded with {there}"
            + (f", and model.init_from {recipe.model.init_from} was not" if recipe.model.init_from else "")
            + f". Run `sora prep` into another data.output, or set codec.caption_cleaning: {there}"
        )
    manifest.null_embedding(recipe.codec.null_prompt)


def check_metric_models(recipe: Recipe) -> None:
    """UserError where the networks that measure a validation can't be read: training would not say so for hours."""
    if recipe.validation.every and recipe.validation.fvd:
        load_i3d(recipe.validation.i3d)
    if recipe.validation.every and recipe.validation.clip:
        find_clip(recipe.validation.clip, recipe.codec.models)


def check_cluster(recipe: Recipe) -> bool:
    """Whether workers take GPUs; UserError if training and the validation beside it do not fit the cluster together."""
    have = ray.cluster_resources()
    wish = recipe.cluster.gpu
    gpu = wish == "yes" or (wish == "auto" and have.get("GPU", 0) >= run_resources(recipe, gpu=True)["GPU"])
    need = run_resources(recipe, gpu)
    short = [
        f"{count:g} {kind} (it has {have.get(kind, 0):g})" for kind, count in need.items() if count > have.get(kind, 0)
    ]
    if short:
        cpus = need["CPU"] if need["CPU"] > have.get("CPU", 0) else 0.0
        beside = f" and {recipe.validation.resources} for validation beside it" if recipe.validation.every else ""
        raise UserError(
            f"the cluster is too small: {recipe.cluster.fewest} workers of {worker_resources(recipe, gpu)}{beside} "
            f"need {', '.join(short)}. Ray would wait for ever: lower cluster.workers, set validation.every to 0, or "
            f"{add_resources_hint(cpus)}"
        )
    full = run_resources(recipe, gpu, most=True)
    if recipe.validation.every and any(count > have.get(kind, 0) >= 1 for kind, count in full.items()):
        log.info(
            f"with more than the fewest of cluster.workers {recipe.cluster.workers} there may be no room left for "
            "validation, which then waits for the end of the run"
        )
    return gpu


def add_resources_hint(cpus: float) -> str:
    """What gives a cluster that was joined more room: of CPUs, where so many are needed in all and there are fewer."""
    counted = f", or start a node's Ray anew with more CPUs than it has cores (`ray start --num-cpus {cpus:g}`)"
    return "add nodes" + (counted if cpus else "")


def run_resources(recipe: Recipe, gpu: bool, most: bool = False) -> dict[str, float]:
    """What the whole run takes of a cluster, with the fewest of its workers or with the most."""
    workers = recipe.cluster.most if most else recipe.cluster.fewest
    need = {kind: count * workers for kind, count in worker_resources(recipe, gpu).items()}
    if recipe.validation.every:
        for kind, count in recipe.validation.resources.items():
            need[kind] = need.get(kind, 0) + count
    return need


def worker_resources(recipe: Recipe, gpu: bool) -> dict[str, float]:
    return {"CPU": float(recipe.cluster.cpus_per_worker), **({"GPU": 1.0} if gpu else {})}
