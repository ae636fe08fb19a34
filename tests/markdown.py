"""The code in pages of Markdown, run as it is printed."""

from __future__ import annotations

import dataclasses
import doctest
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line that it begins at."""

    language: str
    text: str
    line: int


def blocks(path: pathlib.Path, *languages: str) -> list[Block]:
    """The page's fenced blocks in these languages, in order."""
    page = path.read_text("utf-8")
    found = (
        Block(match[1], match[2], page.count("\n", 0, match.start()) + 2)
        for match in _FENCE.finditer(page)
    )
    return [block for block in found if block.language in languages]


def run(path: pathlib.Path, chosen: list[Block], **given) -> dict:
    """Runs blocks one after the other with the same names, and returns these.

    ``python`` blocks are executed, ``pycon`` blocks have to print what stands there; ``given`` are
    names that the page takes from its reader.
    """
    names: dict = {"__name__": path.stem, **given}
    for block in chosen:
        if block.language == "python":
            # Lines count from the page's first, so that a traceback points into the page.
            padded = "\n" * (block.line - 1) + block.text
            exec(compile(padded, str(path), "exec"), names)
        else:
            _check(path, block, names)
    return names


def _check(path: pathlib.Path, block: Block, names: dict) -> None:
    test = doctest.DocTestParser().get_doctest(
        block.text, names, path.name, str(path), block.line - 1
    )
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=OPTIONS)
    runner.run(test, out=report.append, clear_globs=False)
    names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
