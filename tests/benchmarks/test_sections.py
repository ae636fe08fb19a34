from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
from rich.console import Console

from benchmarks.harness import sections
from benchmarks.harness.tables import Column


@dataclasses.dataclass(frozen=True)
class Apple:
    weight: int


@dataclasses.dataclass(frozen=True)
class Pear:
    weight: int
    colour: str | None


WEIGHT = Column("Weight", 8, lambda item: f"{item.weight} g")
COLOUR = Column("Colour", 8, lambda item: item.colour or "-", "left")


@pytest.fixture
def out(environment):
    out = sections.Sections(environment, Console(file=io.StringIO(), width=40))
    out.begin("apples", "Red ones", [WEIGHT])
    out.row(Apple(3))
    out.note("weighed")
    out.begin("pears", "Pears", [WEIGHT, COLOUR])
    out.row(Pear(5, "green"))
    out.begin("apples", "Green ones", [WEIGHT])
    out.row(Apple(4), "apple 4 is rotten")
    return out


def test_printed(out):
    out.close()
    text = out.console.file.getvalue()
    assert text.startswith("python benchmarks/mqa_bench.py\n2026-01-02")
    assert text.index("Red ones") < text.index("weighed") < text.index("Pears")
    assert "     5 g  green" in text
    assert "FAILED: apple 4 is rotten" in text
    assert text.endswith("1 failed:\n  apple 4 is rotten\n")


def test_json(out, tmp_path):
    path = tmp_path / "out.json"
    out.write(path)
    document = json.loads(path.read_text())
    assert document["environment"]["cpu"] == "Some CPU"
    assert document["tables"] == {
        "apples": [{"weight": 3}, {"weight": 4}],
        "pears": [{"weight": 5, "colour": "green"}],
    }
    assert document["failures"] == ["apple 4 is rotten"]


def test_csv(out, tmp_path):
    path = tmp_path / "out.csv"
    out.write(path)
    comment, *lines = path.read_text().splitlines()
    assert json.loads(comment.removeprefix("# "))["cores"] == 2
    assert list(csv.DictReader(lines)) == [
        {"table": "apples", "weight": "3", "colour": ""},
        {"table": "apples", "weight": "4", "colour": ""},
        {"table": "pears", "weight": "5", "colour": "green"},
    ]


def test_markdown(out, tmp_path):
    path = tmp_path / "out.md"
    out.write(path)
    text = path.read_text()
    assert "Pears\n\n| Weight | Colour |\n| --: | :-- |\n| 5 g | green |\n" in text
    assert "\n\nweighed\n\n" in text and text.endswith("FAILED: apple 4 is rotten\n")


def test_nothing_to_write(environment, tmp_path):
    out = sections.Sections(environment, Console(file=io.StringIO()))
    for suffix in ("json", "csv", "md"):
        out.write(tmp_path / f"out.{suffix}")
    out.close()
    assert "failed" not in out.console.file.getvalue()
