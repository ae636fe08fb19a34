"""The documentation's code runs as it is printed, and its commands name what exists."""

from __future__ import annotations

import json
import pathlib
import re
import shlex

import jax
import pytest

from axattn import aot
from tests import markdown, public
from tests.markdown import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
WITH_CODE = [path for path in PAGES if markdown.blocks(path, "python", "pycon")]


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_pages():
    # A pattern that finds nothing would pass every test below.
    assert len(WITH_CODE) >= 9
    assert sum(len(markdown.blocks(path, "python", "pycon")) for path in WITH_CODE) >= 35


@pytest.mark.ci
@pytest.mark.parametrize("path", WITH_CODE, ids=name)
def test_code(path, monkeypatch):
    if path.name == "parallel.md" and len(jax.devices()) != 8:
        pytest.skip("the page has a mesh of eight devices")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    markdown.run(path, markdown.blocks(path, "python", "pycon"))


def test_code_that_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```pycon\n>>> x + 1\n3\n\n```\n")
    with pytest.raises(AssertionError, match="Expected:\n    3\nGot:\n    2"):
        markdown.run(page, markdown.blocks(page, "python", "pycon"))


def test_every_public_module_has_a_page():
    pages = {
        module
        for path in (DOCS / "api").glob("*.md")
        for module in re.findall(r"automodule:: (\S+)", path.read_text("utf-8"))
    }
    assert pages == set(public.MODULES)


@pytest.mark.ci
def test_tables_of_notebooks_are_tables(tmp_path):
    """A page of all Markdown that notebooks put out, built as the documentation is."""
    sphinx = pytest.importorskip("sphinx.cmd.build")
    notebooks = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
    contents = [json.loads(path.read_text("utf-8")) for path in notebooks]
    cells = [
        cell
        for content in contents
        for cell in content["cells"]
        if any("text/markdown" in output.get("data", {}) for output in cell.get("outputs", ()))
    ]
    tables = re.findall(r"\| :-- \|", json.dumps(cells))
    assert len(tables) >= 6
    title = {"cell_type": "markdown", "metadata": {}, "source": "# Tables", "id": "title"}
    page = tmp_path / "page" / "index.ipynb"
    page.parent.mkdir()
    page.write_text(json.dumps(contents[0] | {"cells": [title, *cells]}), "utf-8")
    html = tmp_path / "html"
    assert sphinx.main(["-q", "-W", "-c", str(DOCS), str(page.parent), str(html)]) == 0
    text = (html / "index.html").read_text("utf-8")
    assert text.count("<table") == len(tables) and "--: |" not in text


# ---- commands ---------------------------------------------------------------------------------

COMMANDS = [
    (path, line)
    for path in (ROOT / "README.md", ROOT / "WORKSPACE.md", *PAGES)
    for line in re.findall(
        r"(?:^|[`\s/])(python3? (?:benchmarks|examples)/[^`#\n]*|pytest [^`#\n]*)",
        path.read_text("utf-8").replace("\\\n", " "),
        re.MULTILINE,
    )
]


def test_commands_name_what_exists():
    for path, line in COMMANDS:
        words = shlex.split(line)
        files = [word for word in words if re.match(r"(benchmarks|examples|tests|docs)/", word)]
        for file in files:
            assert (ROOT / file).exists(), f"{name(path)} names {file}"
        if words[0] != "pytest":
            script = ROOT / files[0]
            for flag in re.findall(r"--(\w+)", line):
                assert _defines(script, flag), f"{script.name} has no --{flag} ({name(path)})"


def _defines(script: pathlib.Path, flag: str) -> bool:
    """Whether the script, or a module of the repository that it imports, defines the flag."""
    text = script.read_text("utf-8")
    imported = re.findall(
        r"^from (benchmarks[.\w]*|examples) import ([^#\n(]+|\([^)]*\))", text, re.M
    )
    modules = {f"{where}.{name}" for where, names in imported for name in re.findall(r"\w+", names)}
    modules |= {where for where, _ in imported}
    paths = (ROOT / f"{module.replace('.', '/')}.py" for module in modules)
    text += "".join(path.read_text("utf-8") for path in paths if path.exists())
    names = "|".join(dict.fromkeys((flag, flag.removeprefix("no"))))
    defined = rf"""(?:DEFINE_\w+|add_argument)\(\s*["'](?:--)?({names})["']"""
    return flag == "help" or re.search(defined, text) is not None


def test_commands_are_found():
    assert len(COMMANDS) > 25
    mqa_bench = ROOT / "benchmarks" / "mqa_bench.py"
    assert _defines(mqa_bench, "plot") and _defines(mqa_bench, "norun")
    assert not _defines(mqa_bench, "no_such_flag") and not _defines(mqa_bench, "time")


def test_targets_are_those_that_there_are():
    rows = re.findall(
        r"^\| (`\"[^|]*) \| (?:TPUs|NVIDIA)", (DOCS / "aot.md").read_text("utf-8"), re.M
    )
    names = {target for row in rows for target in re.findall(r'"(\w+)"', row)}
    assert names == set(aot.TARGETS) - {"cpu"}
