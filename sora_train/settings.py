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

from sora_train.errors import RecipeError, one_line
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


def new_name(flag: str) -> str:
    """The present name of a flag's dotted key, with a warning if it was renamed."""
    section, dot, name = flag.rpartition(".")
    present = section + dot + RENAMED.get(name, name)
    if present != flag:
        log.warning(f"--{flag} is now --{present}. Use the new name; version 0.2 will refuse the old one")
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
    sections = [] if section else list(dict.fromkeys(name.partition(".")[0] for name in known))
    found = (
        [name for name in known if names[name] == last]
        or [name for name in meant if name in names]
        or [name for name in here if words <= set(names[name].split("_"))]
        or [name for name in here if names[name] in difflib.get_close_matches(last, names.values(), 3, cutoff=0.75)]
        or difflib.get_close_matches(last, sections, 1, cutoff=0.75)
    )
    if found := list(dict.fromkeys(found))[:4]:
        return f"did you mean {' or '.join(found)}?"
    inside = [name for name in known if name.startswith(f"{key.partition('.')[0]}.")]
    return f"known are {', '.join(inside or dict.fromkeys(name.partition('.')[0] for name in known))}"


_OTHER_NAMES = {
    "train.learning_rate": "lr",
    "train.steps": "epochs num_epochs iterations max_steps max_train_steps",
    "train.batch_size": "train_batch_size",
    "train.micro_batch_size train.batch_size": "gradient_accumulation gradient_accumulation_steps",
    "train.gradient_clip": "max_grad_norm grad_clip",
    "train.schedule": "lr_scheduler",
    "train.warmup_steps": "lr_warmup_steps",
    "train.precision codec.precision": "mixed_precision dtype",
    "train.precision": "fp16 bf16",
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.checkpoint_every": "checkpointing_steps save_every save_steps",
    "train.output data.output out": "output_dir",
    "data.frames": "num_frames",
    "data.height data.width": "resolution size",
    "data.captions": "csv caption_file",
    "data.root": "videos",
    "validation.guidance": "cfg cfg_scale guidance_scale",
    "validation.negative": "negative_prompt",
    "validation.steps": "num_inference_steps",
    "validation.prompts": "validation_prompts",
    "cluster.workers cluster.gpu": "gpus num_gpus",
    "cluster.workers": "num_workers",
    "tracking.wandb": "report_to",
    "tracking.project": "wandb_project",
    "model.init_from": "pretrained",
    "model.width": "hidden_size",
    "model.depth": "num_layers",
    "model.heads": "num_heads",
}
"""Our keys, and other trainers' names for them. An option that is not a key of the recipe has the key's last part."""
SYNONYMS = {name: tuple(ours.split()) for ours, names in _OTHER_NAMES.items() for name in names.split()}


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
        raise RecipeError(f"{path} can't be read as YAML: {one_line(str(error))}") from None
    except RecursionError:
        raise RecipeError(f"{path} can't be read as YAML: it is nested too deeply") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} holds a {type(settings).__name__}; a recipe is a mapping, such as `name: run`")
    return settings


class _Loader(yaml.SafeLoader):
    """SafeLoader whose keys are words that stand once, and for which `wandb: off` and `gpu: no` are words as well.

    A whole number is decimal: YAML 1.1 takes `010` for 8 and `1:30` for 90.
    """

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in ("bool", "int")]
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


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


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
    if kind in ("tuple_type", "list_type"):
        message = f"it takes a list, such as [{got}]"
        if source.startswith("--"):
            message = f"it takes several values, one after the other: {source} {got} …"
    if kind == "missing":
        message = "a value is missing"
    if kind in ("model_type", "dataclass_type", "model_attributes_type", "dict_type"):
        message = "it is a section and takes keys of its own"
    return f"{source} is {got!r}; {message}"
