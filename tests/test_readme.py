"""The README's code runs as it is printed."""

from __future__ import annotations

import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) == 4


def run(blocks) -> dict:
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    return names


def test_layers_and_function(capsys):
    names = run(BLOCKS[:2])
    assert names["y"].shape == (2, 1024, 512)
    assert names["out"].shape == (2, 300, 16, 64) and names["lse"].shape == (2, 300, 16)
    assert "xla_chunked" in capsys.readouterr().out


def test_caches(capsys):
    names = run([BLOCKS[0], BLOCKS[2]])
    assert names["cache"].lengths.tolist() == [1024, 700]
    assert not names["cache"].overflowed.any()
    assert str(2 * 2 * (64 + 4)) in capsys.readouterr().out  # K and V, two heads, with scales


@pytest.mark.aot
def test_report(capsys):
    run([BLOCKS[0], BLOCKS[3]])
    printed = capsys.readouterr().out
    assert "v5p" in printed and "MiB" in printed
