"""The pages for people: their links and the files they name exist."""

import re
from pathlib import Path

import pytest
import torch

from sora_train.model import build, preset
from sora_train.model.config import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "cluster/README.md",
    *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
FOLDERS = ["", "sora_train", "sora_train/launch", "sora_train/launch/preflight", "sora_train/plan", "sora_train/report",
           "sora_train/train", "sora_train/bench", "sora_train/model", "sora_train/diffusion", "data_prep"]  # fmt: skip
"""A page may name a file as it is called in the folder that it speaks of."""


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_on_a_page_leads_somewhere(page: str):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
    for link in (link for link in links if "://" not in link):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_every_module_that_a_page_names_exists(page: str):
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / page).read_text()))
    assert [name for name in sorted(named) if not any((ROOT / folder / name).is_file() for folder in FOLDERS)] == []


def test_the_readme_stays_a_short_read():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_table_of_models_has_every_preset_with_its_size():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    for name in PRESETS:
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[2]]
        sizes = [float(number) for number in re.findall(r"[\d.]+", row.split("|")[3])]
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in build(preset(name)).parameters())
        assert min(sizes) <= round(count / 1e9, 2) <= max(sizes), name
