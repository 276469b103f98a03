"""YAML and flags in, one typed section out; or one message that names the key, what it got, and the choices.

Everything passes pydantic on its way, which is what turns the words of a command line, and the `1e-4` that PyYAML
reads as a string, into numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from sora_train.errors import RecipeError
from sora_train.log import log

S = TypeVar("S")


def build(section: type[S], settings: Mapping[str, Any], overrides: Mapping[str, object], where: str) -> S:
    """Validates nested `settings` with dotted `overrides` laid over them; messages call the settings `where`.

    Raises RecipeError with a line for each key that is unknown or has a wrong value.
    """
    merged = _with_new_names(settings, where)
    for key, value in overrides.items():
        _set(merged, key, value)
    try:
        made = TypeAdapter(section).validate_python(merged)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(detail, section, overrides, where) for detail in error.errors())) from None
    wrong = [
        f"{_source(key, overrides, where)} is {number}; it must be at most {_largest(key)}"
        for key, number in _whole_numbers(made, section)
        if abs(number) > _largest(key)
    ]
    if wrong:
        raise RecipeError("\n".join(wrong))
    return made


RENAMED = {
    "text_in": "cross_attention_in",
    "frame_positions": "temporal_positions",
    "guard_patience": "guard_max_consecutive",
    "guard_rollbacks": "guard_max_rollbacks",
    "resize_s": "elastic_poll_s",
}
"""Keys of earlier versions and their names now. The old names will be refused from version 0.2 on."""


def _with_new_names(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of the settings with the present names of their keys, and one warning that names those renamed."""
    renamed: list[str] = []

    def walk(section: Mapping[str, Any]) -> dict[str, Any]:
        renamed.extend(f"{key} is now {RENAMED[key]}" for key in section if key in RENAMED)
        return {
            RENAMED.get(key, key): walk(value) if isinstance(value, dict) else value for key, value in section.items()
        }

    present = walk(settings)
    if renamed:
        log.warning(f"{where}: {', '.join(renamed)}. Use the new names; version 0.2 will refuse the old ones")
    return present


def _largest(key: str) -> int:
    """The largest whole number that a key takes: what torch and numpy take as a seed, or can surely count with."""
    return 2**63 - 1 if key.endswith("seed") else 2**31 - 1


def _whole_numbers(made: object, section: type) -> Iterator[tuple[str, int]]:
    """Every whole number of a section that was built, with its key."""
    for key, _ in keys(section):
        value = functools.reduce(getattr, key.split("."), made)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                yield key, number


def keys(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a section with its type, depth first: ("train.steps", int) …"""
    for name, hint in own_keys(section).items():
        if is_section(hint):
            yield from keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def flatten(settings: Mapping[Any, Any], prefix: str = "", depth: int = 20) -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings with its dotted key: ("train.steps", 40) …; what is nested deeper is a leaf."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and depth:
            yield from flatten(value, f"{prefix}{key}.", depth - 1)
        else:
            yield f"{prefix}{key}", value


def own_keys(section: type) -> dict[str, Any]:
    """A section's own keys with their types, sections within it among them."""
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    resolved = typing.get_type_hints(section)
    return {field.name: resolved[field.name] for field in dataclasses.fields(section)}


def is_section(hint: Any) -> bool:
    return isinstance(hint, type) and (issubclass(hint, BaseModel) or dataclasses.is_dataclass(hint))


def suggest(key: str, known: Sequence[str]) -> str:
    """Suggests known keys for an unknown one, as the end of a sentence.

    In this order: the same name in another section, a synonym that other trainers use, a name that contains these
    words, a name with a typing error.
    """
    section, _, last = key.replace("-", "_").rpartition(".")
    here = [name for name in known if name.rpartition(".")[0] == section] or list(known)
    names = {name: name.rpartition(".")[2] for name in known}
    meant = [name for target in SYNONYMS.get(last.lower(), ()) for name in (target, target.rpartition(".")[2])]
    words = set(last.lower().split("_"))
    found = (
        [name for name in known if names[name] == last]
        or [name for name in meant if name in names]
        or [name for name in here if words <= set(names[name].split("_"))]
        or [name for name in here if names[name] in difflib.get_close_matches(last, names.values(), 3, cutoff=0.75)]
    )
    if found := list(dict.fromkeys(found))[:4]:
        return f"did you mean {' or '.join(found)}?"
    inside = [name for name in known if name.startswith(f"{key.partition('.')[0]}.")]
    return f"known are {', '.join(inside or dict.fromkeys(name.partition('.')[0] for name in known))}"


SYNONYMS = {
    "lr": ("train.learning_rate",),
    "epochs": ("train.steps",),
    "num_epochs": ("train.steps",),
    "iterations": ("train.steps",),
    "max_steps": ("train.steps",),
    "max_train_steps": ("train.steps",),
    "train_batch_size": ("train.batch_size",),
    "gradient_accumulation": ("train.micro_batch_size", "train.batch_size"),
    "gradient_accumulation_steps": ("train.micro_batch_size", "train.batch_size"),
    "max_grad_norm": ("train.gradient_clip",),
    "grad_clip": ("train.gradient_clip",),
    "lr_scheduler": ("train.schedule",),
    "lr_warmup_steps": ("train.warmup_steps",),
    "mixed_precision": ("train.precision", "codec.precision"),
    "dtype": ("train.precision", "codec.precision"),
    "fp16": ("train.precision",),
    "bf16": ("train.precision",),
    "gradient_checkpointing": ("train.activation_checkpointing",),
    "checkpointing_steps": ("train.checkpoint_every",),
    "save_every": ("train.checkpoint_every",),
    "save_steps": ("train.checkpoint_every",),
    "output_dir": ("train.output", "data.output", "out"),
    "num_frames": ("data.frames",),
    "resolution": ("data.height", "data.width"),
    "size": ("data.height", "data.width"),
    "csv": ("data.captions",),
    "caption_file": ("data.captions",),
    "videos": ("data.root",),
    "cfg": ("validation.guidance",),
    "cfg_scale": ("validation.guidance",),
    "guidance_scale": ("validation.guidance",),
    "negative_prompt": ("validation.negative",),
    "num_inference_steps": ("validation.steps",),
    "validation_prompts": ("validation.prompts",),
    "gpus": ("cluster.workers", "cluster.gpu"),
    "num_gpus": ("cluster.workers", "cluster.gpu"),
    "num_workers": ("cluster.workers",),
    "report_to": ("tracking.wandb",),
    "wandb_project": ("tracking.project",),
    "pretrained": ("model.init_from",),
    "hidden_size": ("model.width",),
    "num_layers": ("model.depth",),
    "num_heads": ("model.heads",),
}
"""Other trainers' names for a key, and ours. An option that is not a key of the recipe has the key's last part."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; only plain values, no tags. Raises RecipeError for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; ready ones lie in jobs/, for instance jobs/quickstart.yaml") from None
    except OSError as error:
        raise RecipeError(f"can't read the recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is no text file; a recipe is YAML in UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the 31st of February, read as a date
        raise RecipeError(f"{path} can't be read as YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{path} can't be read as YAML: it is nested too deeply") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} holds a {type(settings).__name__}; a recipe is a mapping, such as `name: run`")
    return settings


class _Loader(yaml.SafeLoader):
    """SafeLoader whose keys are words that stand once, and for which `wandb: off` and `gpu: no` are words as well."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _set(settings: dict[str, Any], key: str, value: object) -> None:
    """Sets a dotted key in nested mappings; sections that are missing or empty (`train:` alone is null) come to be."""
    *sections, last = key.split(".")
    for section in sections:
        inner = settings.get(section)
        if inner is None:
            inner = settings[section] = {}
        if not isinstance(inner, dict):
            return  # the section is no mapping; validation says so, with its name
        settings = inner
    settings[last] = value


def _source(key: str, overrides: Mapping[str, object], where: str) -> str:
    """Where a key's value comes from: its flag, or the settings."""
    return f"--{key}" if any(key == name or key.startswith(f"{name}.") for name in overrides) else f"{where}: {key}"


def _explain(detail: Mapping[str, Any], section: type, overrides: Mapping[str, object], where: str) -> str:
    """One line for one of pydantic's complaints: where, which key, what it got, what it takes."""
    key = ".".join(str(part) for part in detail["loc"])
    source = _source(key, overrides, where)
    kind, got = detail["type"], detail["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{source} is no known key; {suggest(key, [name for name, _ in keys(section)])}"
    if kind == "literal_error":
        return f"{source} is {got!r}; choices: {detail['ctx']['expected']}"
    if kind == "value_error":  # a section's own check, whose sentence names its keys
        return f"{where}: {detail['ctx']['error']}"
    message = re.sub(r"^\w+ should", "it should", detail["msg"])
    if kind in ("model_type", "dataclass_type", "model_attributes_type", "dict_type"):
        message = "it is a section and takes keys of its own"
    return f"{source} is {got!r}; {message}"
