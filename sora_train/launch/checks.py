"""Checks before a run starts, so a bad recipe fails at once with values and remedy, not hours later."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import ray
import torch

from sora_train.codec import CodecConfig
from sora_train.codec.conventions import cleaning_of, null_prompt_of
from sora_train.codec.files import find_text_encoder, find_vae
from sora_train.data.config import DataConfig, undividable_shapes
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError, first_of
from sora_train.evaluate.i3d import load_i3d
from sora_train.evaluate.similarity import find_clip
from sora_train.latent_shape import shape_errors
from sora_train.launch.init_from import find_initial_weights, saved_initial_weights
from sora_train.launch.resume import saved_null_prompt
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe
from sora_train.schema import bucket_name, bucket_size
from sora_train.storage import reject_job_dir
from sora_train.train import checkpoint
from sora_train.train.compile import check_compile, why_no_tools
from sora_train.train.config import TrainConfig
from sora_train.train.fp8 import check_fp8


def resolve_recipe(recipe: Recipe, fresh: bool = False) -> Recipe:
    """Makes local paths absolute, since workers have other working folders, and resolves `auto` values.

    `model.init_from` becomes the folder of the weights (a hub id is downloaded). A resumed run keeps its first one,
    unless `fresh`.
    """
    if "://" in recipe.train.output:
        raise UserError(
            f"train.output {recipe.train.output} is remote. Set it to a folder that every node sees, such as on NFS",
            code="paths",
        )

    reject_job_dir("data.output", recipe.data.output)
    reject_job_dir("train.output", recipe.train.output)

    def place(name: str) -> str:
        return name if "://" in name else os.path.abspath(os.path.expanduser(name))

    def network(name: str) -> str:
        return place(name) if os.path.isdir(os.path.expanduser(name)) and name != "builtin" else name

    run = Path(place(recipe.train.output)) / recipe.name
    has_recipe = not fresh and (run / "recipe.yaml").is_file()
    resumed = run if has_recipe and checkpoint.complete_checkpoints(run / "checkpoints") else None
    if resumed is not None:
        start = saved_initial_weights(recipe, resumed)
    else:
        start = find_initial_weights(recipe)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"output": place(recipe.data.output)}),
            "validation": recipe.validation.model_copy(
                update={
                    "i3d": recipe.validation.i3d and place(recipe.validation.i3d),
                    "clip": network(recipe.validation.clip),
                    "images": tuple(image and place(image) for image in recipe.validation.images),
                }
            ),
            "codec": recipe.codec.model_copy(
                update={key: network(getattr(recipe.codec, key)) for key in ("vae", "text", "models")}
                | _text_settings(recipe.codec, start, resumed)
            ),
            "model": replace(recipe.model, init_from=start),
            "lora": recipe.lora.model_copy(
                update={"init_from": recipe.lora.init_from and place(recipe.lora.init_from)}
            ),
            "train": recipe.train.model_copy(update={"output": place(recipe.train.output)}),
        }
    )


def _text_settings(codec: CodecConfig, start: str, resumed: Path | None) -> dict[str, str]:
    """Values for `auto`. Captions are cleaned as for the shards, unless initial weights need otherwise."""
    if resumed is not None:
        stated = codec.null_prompt != "auto"
        return {"null_prompt": codec.null_prompt if stated else saved_null_prompt(resumed)}
    cleaning = cleaning_of(codec, start) if start else codec.caption_cleaning
    return {"caption_cleaning": cleaning, "null_prompt": null_prompt_of(codec, start)}


def check_shards(recipe: Recipe) -> Manifest:
    """The shards' manifest. UserError if the shards are missing or do not fit the recipe."""
    shards = ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train")
    manifest, model = shards.manifest, recipe.model
    facts = {"in_channels": manifest.vae.channels, "text_width": manifest.text.width}
    wrong = [
        f"model.{key} is {getattr(model, key)} and the shards have {count}: set model.{key} to {count}"
        for key, count in facts.items()
        if getattr(model, key) != count
    ]
    asked = [bucket_name(*shape) for shape in recipe.data.shapes]
    there = [name for name, count in manifest.buckets.items() if count or name in asked]
    if set(asked) != set(there):
        odd = undividable_shapes(recipe.data, manifest.vae.factor, manifest.vae.time_factor, model.patch)
        wrong.append(
            f"the recipe asks for clips of {', '.join(asked)} and the shards hold {', '.join(there)}: set "
            f"{shape_keys(recipe.data, there)}; or data.output to another folder and run `sora prep` to make others"
            + (f" ({'; '.join(odd)})" if odd else "")
        )
    for name in there:
        odd = shape_errors(bucket_size(name), manifest.vae.factor, manifest.vae.time_factor, model.patch)
        wrong += [f"bucket {name}: {sentence}, or set model.patch to 1" for sentence in odd]
    longest = max(manifest.vae.latent_shape(*bucket_size(name))[0] for name in there)
    if why := recipe.conditioning.leaves_nothing(longest):
        wrong.append(why)
    if wrong:
        raise UserError(f"{recipe.data.output} does not fit the recipe: {'; '.join(wrong)}", code="shards")
    if empty := [name for name in there if not manifest.buckets[name]]:
        raise UserError(
            f"{recipe.data.output} has no clip in the buckets {', '.join(empty)} of the recipe. `sora prep RECIPE "
            "--plan` says why. Add clips for them, or remove them from data.buckets",
            code="shards",
        )
    shards.sample_order(recipe.train.batch_size, recipe.train.seed, recipe.data.image_ratio)  # raises if empty
    return manifest


def shape_keys(data: DataConfig, names: list[str]) -> str:
    """The keys of `data`, with their values, for clips of these buckets."""
    if len(names) > 1 or data.buckets:
        return f"data.buckets to [{', '.join(names)}]"
    shape = dict(zip(("frames", "height", "width"), bucket_size(names[0]), strict=True))
    return " and ".join(f"data.{key} to {n}" for key, n in shape.items() if getattr(data, key) != n)


def check_codec(recipe: Recipe, manifest: Manifest) -> None:
    """UserError if the VAE or text encoder is not the shards', or is out of reach while validation needs it."""
    for key, name, find, facts in (
        ("codec.vae", recipe.codec.vae, find_vae, manifest.vae),
        ("codec.text", recipe.codec.text, find_text_encoder, manifest.text),
    ):
        if name == facts.name and not recipe.validation.every:
            continue
        files = find(name, recipe.codec.models)
        if name != facts.name and files.hash != facts.hash:
            raise UserError(
                f"{key} {name!r} is not what {recipe.data.output} was encoded with ({facts.name!r}); samples would be "
                f"wrong. Use the same as for `sora prep`: --{key} {facts.name}",
                code="codec",
            )


def check_text(recipe: Recipe, manifest: Manifest) -> None:
    """UserError if the shards' captions were cleaned differently, or lack the model's null prompt."""
    wanted, there = recipe.codec.caption_cleaning, manifest.text.caption_cleaning
    if wanted not in ("auto", there):
        raise UserError(
            f"codec.caption_cleaning is {wanted}, but {recipe.data.output} was encoded with {there}"
            + (f", and model.init_from {recipe.model.init_from} was not" if recipe.model.init_from else "")
            + f". Run `sora prep` into another data.output, or set codec.caption_cleaning: {there}",
            code="codec",
        )
    manifest.null_embedding(recipe.codec.null_prompt)


def check_metric_models(recipe: Recipe) -> None:
    """UserError if the networks of FVD or CLIP can't be read, which validation would notice hours later."""
    if recipe.validation.every and recipe.validation.fvd:
        load_i3d(recipe.validation.i3d)
    if recipe.validation.every and recipe.validation.clip:
        find_clip(recipe.validation.clip, recipe.codec.models)


def check_worker(train: TrainConfig, adapters: bool, gpu: bool) -> None:
    """UserError if this machine lacks what a worker needs. Looks at no GPU, so it needs none of its own."""
    if gpu and not (torch.version.cuda or torch.version.hip):
        raise UserError(
            f"workers use GPUs, and torch {torch.__version__} is built for CPUs. Install the build for GPUs, or set "
            "cluster.gpu to no",
            code="package",
        )
    check_compile(train, why_no_tools("cuda" if gpu else "cpu"))
    if train.precision == "fp8":
        check_fp8()
    if adapters and find_spec("peft") is None:
        raise UserError("lora.rank is above 0, which needs peft. Install it (pip install peft)", code="package")


def check_cluster(recipe: Recipe) -> bool:
    """Whether workers use GPUs. UserError if training and validation do not fit the nodes: Ray would wait forever."""
    nodes = alive_nodes()
    gpu = recipe.cluster.gpu == "yes" or (recipe.cluster.gpu == "auto" and not missing_gpus(recipe, nodes))
    room = count_workers(recipe, gpu, nodes)
    if room < recipe.cluster.fewest:
        validation = f" next to validation's {recipe.validation.resources}" if recipe.validation.every else ""
        have = first_of([f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes])
        raise UserError(
            f"the cluster has room for {room} workers of {worker_resources(recipe, gpu)}{validation}, and "
            f"{recipe.cluster.fewest} are needed. Its nodes have {have}. {without_gpus(recipe, gpu, nodes)}"
            "Lower cluster.workers or cluster.cpus_per_worker, set validation.every to 0, or add nodes (or CPUs: `ray "
            "start --num-cpus`)",
            code="cluster",
        )
    if recipe.validation.every and room < recipe.cluster.most:
        log.info(
            f"with more than {room} workers (cluster.workers {recipe.cluster.workers}) validation may have no room and "
            "wait until the run ends"
        )
    return gpu


def without_gpus(recipe: Recipe, gpu: bool, nodes: list[dict[str, float]]) -> str:
    """All flags with which a run that asks for GPUs uses CPUs, if no node has a GPU; otherwise empty."""
    if any(node.get("GPU") for node in nodes):
        return ""
    flags = ["--cluster.gpu no"] if gpu else []
    if recipe.validation.every and recipe.validation.resources.get("GPU"):
        flags.append("--validation.resources.GPU 0")
    return f"To use CPUs alone: {' '.join(flags)}. " if flags else ""


def alive_nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def missing_gpus(recipe: Recipe, nodes: list[dict[str, float]]) -> float:
    """How many GPUs the nodes lack for a run whose workers use one each."""
    return max(0.0, run_resources(recipe, gpu=True)["GPU"] - sum(node.get("GPU", 0) for node in nodes))


def idle_gpus(recipe: Recipe, nodes: list[dict[str, float]]) -> str:
    """What to do if `cluster.gpu: auto` means CPUs because there are too few GPUs; empty if it does not."""
    missing, need = missing_gpus(recipe, nodes), run_resources(recipe, gpu=True)["GPU"]
    if recipe.cluster.gpu != "auto" or not 0 < missing < need:
        return ""
    fewest, workers = recipe.cluster.fewest, int(recipe.cluster.fewest - missing)
    validation = f" and the validation's {recipe.validation.resources}" if need > fewest else ""
    remedy = f"Set cluster.workers to {workers}" if workers > 0 else "Take GPU out of validation.resources"
    return (
        f"training uses no GPU: {fewest} worker{'s' * (fewest > 1)}{validation} need {need:g} GPUs, and the cluster "
        f"has {need - missing:g}. {remedy} to train on GPUs, or cluster.gpu to no to train on CPUs without this warning"
    )


def split_groups(recipe: Recipe, gpu: bool, nodes: list[dict[str, float]]) -> str:
    """What to do if workers that share clips may be placed on two nodes; empty if they can't be.

    Ray places workers one by one, so only a number that divides into groups on every node is sure.
    """
    group, worker = recipe.cluster.sequence_parallel, worker_resources(recipe, gpu)
    room = sorted({fitting(node, worker) for node in nodes if fitting(node, worker) % group})
    if not room or sum(fitting(node, worker) > 0 for node in nodes) == 1:
        return ""
    return (
        f"cluster.sequence_parallel is {group}, and nodes have room for {' or '.join(map(str, room))} workers, so a "
        "group of workers that share clips may be on two nodes, which is much slower. Use a number that divides the "
        f"workers of every node, or nodes with a multiple of {group} {'GPUs' if gpu else 'workers'}"
    )


def count_workers(recipe: Recipe, gpu: bool, nodes: list[dict[str, float]]) -> int:
    """How many workers fit on the nodes next to a validation, each on one node; 0 if the validation fits on none."""
    worker = worker_resources(recipe, gpu)
    validation = dict(recipe.validation.resources) if recipe.validation.every else {}

    def loss(host: dict[str, float]) -> int:
        left = {kind: count - validation.get(kind, 0) for kind, count in host.items()}
        return fitting(host, worker) - fitting(left, worker)

    hosts = [node for node in nodes if all(node.get(kind, 0) >= count for kind, count in validation.items())]
    return sum(fitting(node, worker) for node in nodes) - min(map(loss, hosts)) if hosts else 0


def fitting(node: dict[str, float], worker: dict[str, float]) -> int:
    """How many workers of these resources fit on a node."""
    return max(0, int(min((node.get(kind, 0) + 1e-9) // count for kind, count in worker.items() if count)))


def run_resources(recipe: Recipe, gpu: bool, most: bool = False) -> dict[str, float]:
    """Resources of the whole run, with its fewest workers or with the most."""
    workers = recipe.cluster.most if most else recipe.cluster.fewest
    need = {kind: count * workers for kind, count in worker_resources(recipe, gpu).items()}
    if recipe.validation.every:
        for kind, count in recipe.validation.resources.items():
            need[kind] = need.get(kind, 0) + count
    return need


def worker_resources(recipe: Recipe, gpu: bool) -> dict[str, float]:
    return {"CPU": float(recipe.cluster.cpus_per_worker), **({"GPU": 1.0} if gpu else {})}
