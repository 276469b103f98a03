"""Every key of the recipe changes something: code outside the schema reads it. The trainer before this one had keys,
`learning_rate` among them, that nothing read.

The source is followed as far as annotations lead: an argument `config: TrainConfig`, what is assigned from it, and
what an object keeps of it as `self.config`.
"""

import ast
import dataclasses
import typing
from pathlib import Path
from types import UnionType
from typing import Any

from pydantic import BaseModel

from sora_train.recipe import Recipe
from sora_train.settings import keys

ROOT = Path(__file__).parents[1]
LAID_UNDER = {"model.preset"}  # stands for other keys when a recipe is read, and is nothing itself
SKIP = {("recipe.py", "check")}  # finds contradictions between keys, which is not to follow them


def fields_of(section: type) -> dict[str, Any]:
    if issubclass(section, BaseModel) and section is not BaseModel:
        return {name: field.annotation for name, field in section.model_fields.items()}
    return typing.get_type_hints(section) if dataclasses.is_dataclass(section) else {}


def sections(section: type = Recipe) -> dict[str, type]:
    """Every class of the schema by its name."""
    found = {base.__name__: base for base in section.__mro__ if fields_of(base)}
    for hint in fields_of(section).values():
        if isinstance(hint, type) and not isinstance(hint, UnionType) and fields_of(hint):
            found |= sections(hint)
    return found


CLASSES = sections()


class Reader(ast.NodeVisitor):
    """Collects (class, field) pairs that a module reads of the schema."""

    def __init__(self, module: ast.Module) -> None:
        self.read: set[tuple[str, str]] = set()
        self.kept: dict[str, str] = {}  # self.NAME: class
        self.known: dict[str, str] = {}  # NAME: class
        # Twice, since a method may come before the one that keeps a section.
        for _ in range(2):
            self.visit(module)

    def class_of(self, node: ast.AST | None) -> str | None:
        """The class of the schema that an expression is an instance of."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self.kept:
                return self.kept[node.attr]
            # An object that is annotated elsewhere, such as `trained.recipe`, goes by the name of its attribute.
            if node.attr == "recipe":
                return "Recipe"
            hint = fields_of(CLASSES[owner]).get(node.attr) if (owner := self.class_of(node.value)) else None
            return hint.__name__ if isinstance(hint, type) and hint.__name__ in CLASSES else None
        if isinstance(node, ast.Call):  # such as absolute(recipe) and load_recipe(path)
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            return {"absolute": "Recipe", "load_recipe": "Recipe", "build": "Recipe"}.get(name)
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = dict(self.known)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            words = {word.id for word in ast.walk(argument.annotation or ast.Pass()) if isinstance(word, ast.Name)}
            for name in words & CLASSES.keys():
                self.known[argument.arg] = name
        self.generic_visit(node)
        self.known = before

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            many = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=True) if many else [(target, node.value)]
            for left, right in pairs:
                if found := self.class_of(right):
                    if isinstance(left, ast.Name):
                        self.known[left.id] = found
                    elif isinstance(left, ast.Attribute) and isinstance(left.value, ast.Name):
                        self.kept[left.attr] = found

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and (owner := self.class_of(node.value)):
            self.read.add((owner, node.attr))


def without_the_schema(module: ast.Module, name: str) -> ast.Module:
    """A module without the schema's own classes, whose checks read every key, and without what only checks."""
    body = [
        node
        for node in module.body
        if not (isinstance(node, ast.ClassDef) and node.name in CLASSES)
        and not (isinstance(node, ast.FunctionDef) and (name, node.name) in SKIP)
    ]
    return ast.Module(body, [])


def properties(module: ast.Module) -> dict[tuple[str, str], set[tuple[str, str]]]:
    """What the schema's properties read, by property: reading the property reads those."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and node.name in CLASSES:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    selves = [n for n in ast.walk(method) if isinstance(n, ast.Attribute)]
                    found[node.name, method.name] = {
                        (node.name, n.attr) for n in selves if isinstance(n.value, ast.Name) and n.value.id == "self"
                    }
    return found


def read_anywhere() -> set[tuple[str, str]]:
    modules = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for package in ("sora_train", "data_prep")
        for path in (ROOT / package).rglob("*.py")
    }
    read: set[tuple[str, str]] = set()
    for path, module in modules.items():
        read |= Reader(without_the_schema(module, path.name)).read
    through = {key: reads for module in modules.values() for key, reads in properties(module).items()}
    for _ in range(3):  # a property may read a property
        read |= {inner for key in read & through.keys() for inner in through[key]}
    return read


def test_every_key_of_the_recipe_is_read_by_code_that_is_not_the_schema():
    read = read_anywhere()
    owners = {}
    for key, _ in keys(Recipe):
        *path, name = key.split(".")
        owner: Any = Recipe
        for section in path:
            owner = fields_of(owner)[section]
        owners[key] = {(base.__name__, name) for base in owner.__mro__}
    unread = [key for key, places in owners.items() if not places & read and key not in LAID_UNDER]
    assert not unread, f"nothing reads {', '.join(unread)}"


def test_a_key_that_nothing_reads_is_noticed():
    source = ast.parse("def f(config: TrainConfig):\n    rate = config.learning_rate\n    self.data = config\n")
    assert Reader(source).read == {("TrainConfig", "learning_rate")}
