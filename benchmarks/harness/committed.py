"""Results that are in the repository, for those who cannot make them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "results"


def path(name: str) -> pathlib.Path:
    """The file ``name`` in ``benchmarks/results``.

    Raises:
      ValueError: there is no such file.
    """
    found = FOLDER / name
    if not found.is_file():
        known = ", ".join(sorted(file.name for file in FOLDER.iterdir()))
        raise ValueError(f"name takes one of {known}, got {name!r}")
    return found


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file that ``mqa_bench.py`` wrote."""
    return json.loads(path(name).read_text("utf-8"))["rows"]


def provenance(name: str) -> str:
    """Date, versions and command of a JSON file of results, in a line."""
    environment = json.loads(path(name).read_text("utf-8"))["environment"]
    versions = environment["versions"]
    shown = (
        f"{package} {versions[package]}" for package in ("jax", "libtpu") if package in versions
    )
    command = " ".join(environment["command"].split(" --")[:1])
    return f"benchmarks/results/{name}: {environment['date'][:10]}, {', '.join(shown)}, `{command}`"


def section(name: str, heading: str) -> str:
    """What stands below a heading ``## ...`` of a page of results.

    Raises:
      ValueError: the page has no such heading.
    """
    sections = path(name).read_text("utf-8").split("\n## ")
    for text in sections[1:]:
        title, _, body = text.partition("\n")
        if title.strip() == heading:
            return body.strip()
    known = ", ".join(text.partition("\n")[0] for text in sections[1:])
    raise ValueError(f"heading takes one of {known}, got {heading!r}")
