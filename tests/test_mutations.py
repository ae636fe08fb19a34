"""The table of mutations fits the code: what it replaces is there, and so are its tests."""

from __future__ import annotations

import ast

from tests import mutations


def test_every_mutation_is_found():
    table = mutations.table()  # ValueError for a line that is not there, or twice
    assert len(table) > 200
    names = {}
    for mutation in table:
        assert mutation["tests"], mutation
        for test in mutation["tests"]:
            path, *nodes = test.partition("[")[0].split("::")
            if path not in names:
                tree = ast.parse((mutations.ROOT / path).read_text("utf-8"))
                kinds = (ast.FunctionDef, ast.ClassDef)
                names[path] = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
            assert names[path] >= set(nodes), test
