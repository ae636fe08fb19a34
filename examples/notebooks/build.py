"""Executes the notebooks and writes them with their outputs.

    python examples/notebooks/build.py                    # all of them
    python examples/notebooks/build.py drop_in --tiny     # one, with the sizes of the tests
    python examples/notebooks/build.py --check            # do sources and notebooks say the same?

A notebook's source is its ``.py`` in jupytext's percent format; the ``.ipynb`` is made from it and
never edited. The tests (tests/examples/test_notebooks.py) run :func:`execute` with tiny sizes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).resolve().parent
NAMES = ("drop_in", "what_does_it_cost", "generation", "inside_a_kernel", "long_context")
# What notebooks look at to take small sizes.
TINY = "AXATTN_TINY"


def read(name: str) -> nbformat.NotebookNode:
    """The notebook of the source ``name``.py, without outputs.

    Raises:
      ValueError: there is no such notebook.
    """
    if name not in NAMES:
        raise ValueError(f"name takes one of {', '.join(NAMES)}, got {name!r}")
    notebook = jupytext.read(FOLDER / f"{name}.py")
    # What an installation of Jupyter adds is no part of the notebook.
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name.replace('_', '-')}-{number}"  # the same in every build
    return notebook


def execute(name: str, *, tiny: bool = False, seconds_per_cell: int = 600) -> nbformat.NotebookNode:
    """Runs the source ``name``.py in a kernel of this Python, as its reader would.

    Args:
      name: one of `NAMES`.
      tiny: with the sizes of the tests.
      seconds_per_cell: how long a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised; the message has its traceback.
    """
    notebook = read(name)
    environment = {**os.environ, TINY: "1" if tiny else "0", "MPLBACKEND": _INLINE}
    if tiny:
        environment.setdefault("XLA_FLAGS", _QUICK_TO_COMPILE)
    client = NotebookClient(
        notebook,
        timeout=seconds_per_cell,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)
    return notebook


# Small sizes run in no time and compile as long as large ones.
_QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# What Jupyter sets: pictures appear below their cells.
_INLINE = "module://matplotlib_inline.backend_inline"


def write(name: str, notebook: nbformat.NotebookNode) -> pathlib.Path:
    """Writes the notebook beside its source, and returns where."""
    path = FOLDER / f"{name}.ipynb"
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return path


def written(name: str) -> nbformat.NotebookNode:
    """The notebook as it was written, with its outputs."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def differences(name: str) -> list[str]:
    """What is not the same in a source and in its written notebook; empty where all is."""
    source, there = read(name), written(name)
    if len(source.cells) != len(there.cells):
        return [f"{name}: {len(source.cells)} cells in the source, {len(there.cells)} written"]
    return [
        f"{name}: cell {number} is not that of the source"
        for number, (ours, theirs) in enumerate(zip(source.cells, there.cells, strict=True))
        if (ours.cell_type, ours.source) != (theirs.cell_type, theirs.source)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(NAMES)}; all by default")
    parser.add_argument("--tiny", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--check", action="store_true", help="run nothing, compare")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"no notebook {name!r}: {', '.join(NAMES)}")
    found = []
    for name in options.names or NAMES:
        if options.check:
            found += differences(name)
            continue
        notebook = execute(name, tiny=options.tiny)
        print(name, "ran" if options.tiny else write(name, notebook), flush=True)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
