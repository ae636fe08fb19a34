"""Results as files: json and csv, which read back, and markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence

from benchmarks.harness import noise, published, rows, tables
from benchmarks.harness.environment import Environment
from benchmarks.harness.rows import Row

SUFFIXES = (".json", ".csv", ".md")


def check_path(path: str, flag: str = "output") -> pathlib.Path:
    """The path; ValueError where there is no such format or folder, before hours are spent."""
    checked = pathlib.Path(path).expanduser()
    if checked.suffix not in SUFFIXES:
        raise ValueError(f"--{flag}: {path!r} takes one of the endings {', '.join(SUFFIXES)}")
    if not checked.parent.is_dir():
        raise ValueError(f"--{flag}: {path!r}: the folder does not exist")
    return checked


def write(path: pathlib.Path, results: Sequence[Row], environment: Environment) -> None:
    """Writes all rows, in the format that the ending names."""
    writers = {".json": _json, ".csv": _csv, ".md": _markdown}
    path.write_text(writers[path.suffix](results, environment), encoding="utf-8")


def read(path: pathlib.Path) -> tuple[list[Row], dict]:
    """Rows and environment of a json or csv file that `write` wrote."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        document = json.loads(text)
        return [rows.from_dict(values) for values in document["rows"]], document["environment"]
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    data = [line for line in text.splitlines(keepends=True) if not line.startswith("# ")]
    return [rows.from_dict(values) for values in csv.DictReader(data)], json.loads(comments[0])


def _json(results: Sequence[Row], environment: Environment) -> str:
    document = {"environment": environment.to_dict(), "rows": [row.to_dict() for row in results]}
    return json.dumps(document, indent=1) + "\n"


def _csv(results: Sequence[Row], environment: Environment) -> str:
    out = io.StringIO()
    # One comment line; pandas.read_csv(path, comment="#") skips it.
    out.write(f"# {json.dumps(environment.to_dict())}\n")
    writer = csv.DictWriter(
        out, [field.name for field in dataclasses.fields(Row)], lineterminator="\n"
    )
    writer.writeheader()
    for row in results:
        # One line per row: messages of compilers go on for pages.
        values = row.to_dict().items()
        writer.writerow({k: " ".join(v.split()) if isinstance(v, str) else v for k, v in values})
    return out.getvalue()


def _markdown(results: Sequence[Row], environment: Environment) -> str:
    parts = [f"`{environment.command}`, {environment.date}", environment.summary()]
    for where in dict.fromkeys(row.where for row in results):
        part = [row for row in results if row.where == where]
        parts += [
            heading(where, part, environment),
            tables.markdown(columns(where, environment), part),
        ]
    if any(row.speedup_is_noise for row in results):
        parts.append(noise.LEGEND)
    if any(str(row.config) in published.AXLEARN for row in results):
        lines = [published.HEADERS, [":--"] * len(published.HEADERS)]
        parts.append(tables.markdown_lines([*lines, *published.beside_ours(results)]))
        parts.append(f"Published: {published.SOURCE}; batch, dtype and direction unknown.")
    return "\n\n".join(parts) + "\n"


def heading(where: str, part: Sequence[Row], environment: Environment) -> str:
    """What a table is of."""
    if where == "here":
        return f"Run on this machine ({environment.device})"
    device = next((row.device for row in part if row.device), None)
    return f"Compiled for {where}{f' ({device})' if device else ''}; nothing was run"


def columns(where: str, environment: Environment) -> list[tables.Column]:
    """The columns for rows of one place."""
    if where == "here":
        return tables.columns_here(environment.platform)
    return tables.columns_target("Host memory" if where == "cpu" else "HBM")
