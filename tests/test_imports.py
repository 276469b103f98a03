"""Imports: no cycles, not even inside functions, and nothing slow that a command does not need."""

import subprocess
import sys
from graphlib import TopologicalSorter

import grimp


def test_imports_have_no_cycle():
    graph = grimp.build_graph("data_prep", "sora_train", exclude_type_checking_imports=True, cache_dir=None)
    order = TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    order.prepare()  # raises CycleError, which names the modules


def test_a_recipe_is_read_without_importing_the_compiler():
    code = "import sys, sora_train.recipe, data_prep.pipeline; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
