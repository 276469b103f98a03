"""No module of the product imports itself by way of others, not even inside a function."""

from graphlib import TopologicalSorter

import grimp


def test_imports_have_no_cycle():
    graph = grimp.build_graph("data_prep", "sora_train", exclude_type_checking_imports=True, cache_dir=None)
    order = TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    order.prepare()  # raises CycleError, which names the modules
