"""cluster/README.md: what it tells people to type exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sora_train.commands import COMMANDS
from sora_train.flags import parse_flags
from sora_train.launch.preflight.verdicts import check_batch
from sora_train.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
PAGES = ("cluster/README.md", "cluster/slurm.sbatch", "README.md", "SECURITY.md")


def typed(page: str) -> Iterator[list[str]]:
    """The words of every command of `sora`, `sbatch` or `ray job submit` on a page, in code and between backticks."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"^(?:#? {3,4})(.*)$", text, flags=re.MULTILINE) + re.findall(r"`([^`]+)`", text)
    for line in [*code, *(line for block in fenced for line in block.splitlines())]:
        words = shlex.split(line.split(" #")[0].split(" && ")[-1], comments=False) if "'" not in line else []
        if "--" in words and words[:3] == ["ray", "job", "submit"]:
            yield words[words.index("--") + 1 :]
        if "cluster/slurm.sbatch" in words:
            verb = "prep" if "SORA_VERB=prep" in words else "train"
            yield ["sora", verb, *words[words.index("cluster/slurm.sbatch") + 1 :]]
        if words[:1] == ["sora"] and len(words) > 2:
            yield words


COPIES = {"my_job.yaml": "jobs/real_clips.yaml", "my_wan.yaml": "jobs/wan2.1_1.3b_finetune.yaml"}
"""The recipes that a reader of the README copies."""


def judge(words: list[str]) -> None:
    """AssertionError or RecipeError where a command could not be meant."""
    sora, verb, *rest = words
    assert (sora, verb in COMMANDS) == ("sora", True), words
    rest = [word for word in rest if word not in ("--fresh", "--plan", "--new-data")]
    if verb == "download":
        rest = rest[: rest.index("--to")]
    if verb in ("prep", "train", "download") and not any("RECIPE" in word or word == "--help" for word in rest):
        flags, (file,) = parse_flags(rest, Recipe)
        recipe = load_recipe(ROOT / COPIES.get(file, file), flags)
        if verb == "train":
            check_batch(recipe)


@pytest.mark.parametrize("page", PAGES[:3])
def test_every_command_on_the_page_is_one(page: str):
    commands = list(typed(page))
    assert len(commands) >= {"cluster/README.md": 12, "cluster/slurm.sbatch": 2, "README.md": 8}[page]
    for words in commands:
        judge(words)


@pytest.mark.parametrize(
    "words",
    [
        "sora trian jobs/quickstart.yaml",
        "sora train jobs/none.yaml",
        "sora prep jobs/quickstart.yaml --dat 3",
        "sora train jobs/latte_xl_256.yaml --cluster.workers 16",
    ],
)
def test_a_command_that_is_none_is_found(words: str):
    with pytest.raises((AssertionError, ValueError)):
        judge(words.split())


@pytest.mark.parametrize("page", PAGES)
def test_every_file_on_the_page_is_there(page: str):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?<![\w/])((?:cluster|jobs|tests)/[\w./-]*\w)", text))
    assert len(named) > 1
    assert [name for name in named if name != "jobs/RECIPE.yaml" and not (ROOT / name).exists()] == []


def test_names_on_the_page_are_those_in_the_kubernetes_files():
    text = (ROOT / "cluster/README.md").read_text()
    (cluster,) = yaml.safe_load_all((ROOT / "cluster/kuberay/cluster.yaml").read_text())
    (job,) = yaml.safe_load_all((ROOT / "cluster/kuberay/job.yaml").read_text())
    secret, name = cluster["spec"]["authOptions"]["secretName"], cluster["metadata"]["name"]
    assert f"create secret generic {secret} --from-file=auth_token=" in text
    assert f"svc/{name}-head-svc" in text
    assert f"logs -f job/{job['metadata']['name']}" in text
    assert all(f"-n {kind['metadata']['namespace']} " in text for kind in (cluster, job))
