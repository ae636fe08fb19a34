"""Rows of results: read from the benchmarks' files, filtered, and grouped into panels."""

from __future__ import annotations

import json
import numbers
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

# Fields that tell cases apart, in the order of titles, with what titles write before the value.
_CASE = {
    "table": "",
    "layer": "",
    "model": "",
    "where": "",
    "direction": "",
    "dtype": "",
    "batch": "batch ",
    "model_dim": "model size ",
    "hidden": "hidden size ",
    "heads": "heads ",
    "kv_heads": "KV heads ",
    "head_dim": "head size ",
    "head_ways": "head ways ",
    "chips": "chips ",
    "length": "length ",
    "seq_len": "length ",
}
# Larger models have more heads: along these fields, heads vary within a line.
_GROW_WITH = {"hidden": ("heads", "kv_heads"), "model_dim": ("heads", "kv_heads")}

_TAKES = (
    "results takes the path of a JSON file that a benchmark wrote, what is in it, or rows (dicts)"
)


def read_rows(results: Any) -> tuple[list[dict[str, Any]], Mapping[str, Any] | None]:
    """Read the rows of what `plot_curves` takes, and the environment where it is known."""
    environment = None
    if isinstance(results, (str, os.PathLike)):
        results = json.loads(pathlib.Path(results).read_text("utf-8"))
    if isinstance(results, Mapping):
        environment = results.get("environment")
        if "rows" not in results and "tables" not in results:
            raise ValueError(f"{_TAKES}, got a document with {', '.join(results) or 'nothing'}")
        tables = results.get("tables", {"": results.get("rows")})
        results = [
            {"table": name, **row} if name else row for name, rows in tables.items() for row in rows
        ]
    if not isinstance(results, Sequence) or isinstance(results, (str, bytes)):
        raise TypeError(f"{_TAKES}, got {type(results).__name__}")
    for row in results:
        if not isinstance(row, Mapping):
            raise TypeError(f"{_TAKES}, got a row of type {type(row).__name__}")
    # Rows without a line are summaries, such as the best of each layer.
    return [dict(row) for row in results if name_line(row) is not None], environment


def name_line(row: Row) -> str | None:
    """Return the name of a row's line: the implementation and its options; None without one."""
    name = row.get("implementation") or row.get("strategy")
    if name is None:
        return None
    parts = [name, *([row["form"]] if row.get("form") else [])]
    if row.get("heads_at_once") is False:
        parts.append("head by head")
    if row.get("fused_qkv"):
        parts.append("one QKV product")
    return ", ".join(parts)


def filter_rows(rows: Sequence[Row], wanted: Mapping[str, Any]) -> list[Row]:
    """Return the rows whose fields have these values, or one of several.

    Raises:
      ValueError: no row has the field, or none has the value.
    """
    for field, value in wanted.items():
        there = dict.fromkeys(row[field] for row in rows if _is_plain(row.get(field)))
        if not there:
            fields = dict.fromkeys(field for row in rows for field in row)
            raise ValueError(f"{field} is no field of the rows; they have {', '.join(fields)}")
        values = value if isinstance(value, (list, tuple, set, frozenset)) else (value,)
        rows = [row for row in rows if row.get(field) in values]
        if not rows:
            raise ValueError(f"{field}={value!r} leaves no row; it is {_format_values(there)}")
    return list(rows)


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, (Mapping, list))


def _format_values(values: Any) -> str:
    return ", ".join(map(repr, values))


def group_panels(rows: Sequence[Row], x: str) -> dict[tuple, list[Row]]:
    """Group rows by their case: all that they are besides ``x`` and the implementation.

    Groups with a single ``x`` are left out where others have several.

    Raises:
      ValueError: ``x`` is no field with numbers above 0.
    """
    there = [row for row in rows if is_drawable(row.get(x))]
    if not there:
        known = dict.fromkeys(f for row in rows for f, value in row.items() if _is_number(value))
        raise ValueError(f"x takes a field with numbers: {', '.join(known)}; got {x!r}")
    left_out = (x, *_GROW_WITH.get(x, ()))
    groups: dict[tuple, list[Row]] = {}
    for row in there:
        key = tuple((f, row[f]) for f in _CASE if f not in left_out and _is_plain(row.get(f)))
        groups.setdefault(key, []).append(row)
    several = {k: g for k, g in groups.items() if len({row[x] for row in g}) > 1}
    return several or groups


def is_drawable(value: Any) -> bool:
    """Return whether a value has a place on a logarithmic axis."""
    return _is_number(value) and 0 < value < float("inf")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def make_titles(keys: Sequence[tuple], left_out: Sequence[str] = ()) -> tuple[list[str], str]:
    """Return each panel's title, and what all have in common; fields may be left out of that.

    Spaces within an item are such that lines do not break there: see `wrap_text`.
    """
    cases = [dict(key) for key in keys]
    same = [
        field
        for field in _CASE
        if all(field in case and case[field] == cases[0][field] for case in cases)
    ]
    # The name of a table tells less than its fields.
    left_out = ("table", *left_out)
    common = [_format_field(field, cases[0][field]) for field in same if field not in left_out]
    own = [
        [_format_field(f, v) for f, v in case.items() if f not in same and f != "table"]
        for case in cases
    ]
    return list(map(", ".join, own)), ", ".join(common)


def _format_field(field: str, value: Any) -> str:
    text = "run here" if (field, value) == ("where", "here") else f"{_CASE[field]}{value}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def wrap_text(text: str, letters: int) -> list[str]:
    """Break a text into lines of at most so many letters."""
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in textwrap.wrap(text, letters)]


def make_caption(rows: Sequence[Row], environment: Mapping[str, Any] | None) -> str:
    """Say where the numbers are from."""
    if environment is None:
        return ""
    here = environment.get("device")
    here = environment.get("cpu") if environment.get("platform") == "cpu" else here
    places = dict.fromkeys(row["where"] for row in rows if row.get("where"))
    texts = [f"run on {here}"] if "here" in places else []
    absent = [place for place in places if place != "here"]
    if absent:
        texts.append(f"compiled for {', '.join(absent)}, not run")
    version = environment.get("versions", {}).get("jax")
    return "; ".join([*texts, f"jax {version}", str(environment.get("date"))[:10]])
