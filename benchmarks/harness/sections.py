"""Several tables of one script, each with rows of its own kind: printed as they come, then written.

A row is a dataclass, and a file has all its fields, more than the table shows.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks.harness import noise, tables
from benchmarks.harness.environment import Environment


@dataclasses.dataclass
class Section:
    """One table. Tables of one name, say one for each number of heads, are one in a file."""

    name: str
    title: str
    columns: Sequence[tables.Column]
    rows: list[Any] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


class Sections:
    """The tables of one invocation.

    Attributes:
      failures: what went wrong, a line each; the script's exit status is 1 where there is any.
    """

    def __init__(self, environment: Environment, console: Console | None = None):
        self.environment = environment
        self.console = console or Console()
        self.sections: list[Section] = []
        self.failures: list[str] = []
        self.print(environment.header())

    def begin(self, name: str, title: str, columns: Sequence[tables.Column]) -> None:
        """Starts a table: its title and header."""
        self.sections.append(Section(name, title, columns))
        self.print(f"\n{title}")
        self._stream = tables.Stream(self.console, columns)
        self._stream.header()

    def row(self, item: Any, failure: str | None = None) -> None:
        """Adds a row to the table begun last; with ``failure``, says so under it."""
        self.sections[-1].rows.append(item)
        self._stream.row(item, "red" if failure else None)
        if failure:
            self.failures.append(failure)
            self.print(f"    FAILED: {failure}")

    def note(self, text: str) -> None:
        """A line under the table."""
        self.sections[-1].notes.append(text)
        self.print(text)

    def note_noise(self, field: str) -> None:
        """Under the table, what the mark of noise means, where a row has it in this field."""
        if any(getattr(row, field, False) for row in self.sections[-1].rows):
            self.note(noise.LEGEND)

    def close(self) -> None:
        """Repeats the failures: the tables above are long."""
        if self.failures:
            self.print(f"\n{len(self.failures)} failed:")
        for failure in self.failures:
            self.print(f"  {failure}")

    def print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def write(self, path: pathlib.Path, picture: pathlib.Path | None = None) -> None:
        """Writes all rows: ``.json``, ``.csv`` (one table, whose first column says which) or
        ``.md``, which then shows the picture."""
        writers = {".json": self._json, ".csv": self._csv, ".md": self._markdown}
        text = writers[path.suffix]()
        if picture is not None and path.suffix == ".md":
            text += f"\n![{picture.stem}]({os.path.relpath(picture, path.parent)})\n"
        path.write_text(text, encoding="utf-8")

    def by_name(self) -> dict[str, list[dict[str, Any]]]:
        """Rows as dictionaries, by the name of their table."""
        found: dict[str, list[dict[str, Any]]] = {}
        for section in self.sections:
            rows = found.setdefault(section.name, [])
            rows.extend(map(dataclasses.asdict, section.rows))
        return found

    def _json(self) -> str:
        document = {
            "environment": self.environment.to_dict(),
            "tables": self.by_name(),
            "failures": self.failures,
        }
        return json.dumps(document, indent=1) + "\n"

    def _csv(self) -> str:
        rows = [{"table": n, **row} for n, found in self.by_name().items() for row in found]
        names = list(dict.fromkeys(name for row in rows for name in row)) or ["table"]
        out = io.StringIO()
        # One comment line; pandas.read_csv(path, comment="#") skips it.
        out.write(f"# {json.dumps(self.environment.to_dict())}\n")
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def _markdown(self) -> str:
        where = self.environment
        parts = [f"`{where.command}`, {where.date}", where.summary()]
        for section in self.sections:
            rule = [":--" if c.justify == "left" else "--:" for c in section.columns]
            lines = [[c.header for c in section.columns], rule]
            lines += [[c.cell(row) for c in section.columns] for row in section.rows]
            parts += [section.title, tables.markdown_lines(lines), *section.notes]
        parts += [f"FAILED: {failure}" for failure in self.failures]
        return "\n\n".join(parts) + "\n"
