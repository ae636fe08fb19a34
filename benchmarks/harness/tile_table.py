"""`block_sizes.json`: read, merged with new rows, written.

    {"provenance": {RUN: {"device": ..., "jax": ..., "command": ..., ...}, ...},
     "rows": [{"kernel": ..., "kind": ..., "head_dim": ..., "value_head_dim": ...,
               "block_sizes": {...}, "how": "measured", "run": RUN, "microseconds": ...,
               "tflops": ...}, ...]}

A run is named by its date. Rows that a run did not decide keep what they say and whose they are.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import axattn
from axattn.kernels._hopper.block_sizes import BLOCK_SIZES, load_table
from benchmarks.harness.tile_candidates import HEAD_SIZES, KERNELS, KINDS, Place

PATH = pathlib.Path(axattn.__file__).parent / "kernels" / "_hopper" / "block_sizes.json"


def row(place: Place, tiles: Any, **provenance: Any) -> dict[str, Any]:
    """A row of the table; of the tiles, what is not as by default."""
    fields = dataclasses.fields(tiles)
    values = {f.name: getattr(tiles, f.name) for f in fields if getattr(tiles, f.name) != f.default}
    return {**dataclasses.asdict(place), "block_sizes": values, **provenance}


def merged(
    table: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    run: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The table with ``rows`` in place of those of the same place, in order."""
    # A kind that there is no more has no rows.
    by_place = {_place(old): dict(old) for old in table["rows"] if old["kind"] in KINDS}
    for new in rows:
        by_place[_place(new)] = {**new, "run": run}
    found = sorted(by_place.values(), key=_order)
    # A run whose rows have all been replaced is forgotten.
    used = {one.get("run") for one in found}
    known = {**table["provenance"], run: dict(provenance)}
    kept = {name: value for name, value in known.items() if name in used or None in used}
    return {"provenance": kept, "rows": found}


def _place(one: Mapping[str, Any]) -> Place:
    return Place(*(one[field.name] for field in dataclasses.fields(Place)))


def _order(one: Mapping[str, Any]) -> tuple:
    place = _place(one)
    sizes = place.head_dim, place.value_head_dim
    known = HEAD_SIZES.index(sizes) if sizes in HEAD_SIZES else len(HEAD_SIZES)
    return KERNELS.index(place.kernel), KINDS.index(place.kind), known, sizes


def tiles_of(place: Place) -> Any:
    """The tiles that the library's own table has for a place.

    Raises:
      ValueError: it has no row for it.
    """
    for one in load_table()["rows"]:
        if _place(one) == place:
            return BLOCK_SIZES[place.kernel](**one["block_sizes"])
    raise ValueError(f"place takes one that {PATH.name} has a row for, got {place}")


def read(path: pathlib.Path = PATH) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(table: Mapping[str, Any], path: pathlib.Path = PATH) -> None:
    """One line per run and per row, so that changes read well."""
    runs = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in table["provenance"].items()]
    rows = [f"    {json.dumps(one)}" for one in table["rows"]]
    lines = ["{", '  "provenance": {', ",\n".join(runs), "  },", '  "rows": [']
    path.write_text("\n".join([*lines, ",\n".join(rows), "  ]", "}"]) + "\n", encoding="utf-8")
