"""The notebooks run, in a kernel of their own and with small sizes, and are those of their sources."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from tests.markdown import ROOT

pytestmark = pytest.mark.ci
NAMES = sorted(path.stem for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"))
# The longest of them, on a machine that does other things besides.
SECONDS_PER_CELL = 300


@pytest.fixture(scope="module")
def build():
    """Jupyter takes its time to import."""
    from examples.notebooks import build

    return build


@pytest.fixture(autouse=True)
def on_this_platform(monkeypatch):
    """A kernel is another process: it knows nothing of the devices that the tests simulate."""
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_runs(build, name):
    notebook = build.execute(name, tiny=True, seconds_per_cell=SECONDS_PER_CELL)
    assert pictures(notebook) == pictures(build.written(name))
    assert not any(output.output_type == "error" for output in outputs(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_written_is_what_the_source_gave(build, name):
    """And says nothing of the machine that made it."""
    assert build.differences(name) == []
    notebook = build.written(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "it was written without being run"
    assert pictures(notebook) >= 1
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert not any(output.get("name") == "stderr" for output in outputs(notebook))
    text = (build.FOLDER / f"{name}.ipynb").read_text("utf-8")
    assert not re.findall(r"[\"' (](/(?:home|root|tmp|work|usr|opt|mnt|Users)/\S*)", text)


def test_one_install_cell(build):
    assert set(NAMES) == set(build.NAMES)
    cells = {}
    for name in NAMES:
        code = [cell for cell in build.read(name).cells if cell.cell_type == "code"]
        assert "install" in code[0].metadata.get("tags", ()), name
        cells[name] = code[0].source
    assert len(set(cells.values())) == 1


def test_install_cell_keeps_the_jax_that_is_there(build, monkeypatch):
    """Where axattn is missing, pip is held to the versions of what belongs to JAX."""
    cell = next(cell for cell in build.read("drop_in").cells if cell.cell_type == "code")
    called = []

    def run(command, check):
        constraints = pathlib.Path(command[command.index("-c") + 1])
        called.append((command, constraints.read_text().splitlines()))

    monkeypatch.chdir(build.FOLDER)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict = {}
    exec(cell.source, names)
    ((command, kept),) = called
    assert command[-1] == f"{build.FOLDER.parents[1]}[plot]"
    assert f"jax=={importlib.metadata.version('jax')}" in kept
    assert f"jaxlib=={importlib.metadata.version('jaxlib')}" in kept
    assert not any(line.startswith(("flax", "numpy")) for line in kept)
    assert names["TINY"] in (True, False)


def test_install_cell_installs_nothing_twice(build, monkeypatch):
    cell = next(cell for cell in build.read("drop_in").cells if cell.cell_type == "code")
    monkeypatch.chdir(build.FOLDER)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(cell.source, {})


def test_unknown_name(build):
    with pytest.raises(ValueError, match="name takes one of drop_in, .*got 'nope'"):
        build.read("nope")


def test_a_cell_that_fails_is_told(build, monkeypatch, tmp_path):
    (tmp_path / "drop_in.py").write_text("# %%\nassert 1 == 2, 'on purpose'\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    with pytest.raises(Exception, match="on purpose"):
        build.execute("drop_in")
    (tmp_path / "drop_in.py").write_text("# %%\nx = 1\n")
    build.write("drop_in", build.execute("drop_in"))
    assert build.differences("drop_in") == []
    (tmp_path / "drop_in.py").write_text("# %%\nx = 2\n")
    assert build.differences("drop_in") == ["drop_in: cell 0 is not that of the source"]
