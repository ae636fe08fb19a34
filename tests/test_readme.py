"""The README's code runs as it is printed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io

import numpy as np
import pytest

from tests import markdown
from tests.huggingface import golden, save

README = markdown.ROOT / "README.md"
BLOCKS = markdown.blocks(README, "python")

run = functools.partial(markdown.run, README)


@functools.cache
def after(*numbers):
    """Names, and what the last one printed, after these blocks in this order."""
    names, printed = after(*numbers[:-1])[0] if numbers[:-1] else {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = run([BLOCKS[numbers[-1]]], **names)
    return names, printed.getvalue()


def test_there_are_blocks():
    assert len(BLOCKS) == 8


def test_layers_and_function():
    names, printed = after(0, 1)
    assert names["y"].shape == (2, 1024, 512)
    assert names["out"].shape == (2, 300, 16, 64) and names["lse"].shape == (2, 300, 16)
    assert "xla_chunked" in printed


def test_caches():
    names, printed = after(0, 1, 2)
    assert names["cache"].lengths.tolist() == [1024, 700]
    assert not names["cache"].overflowed.any()
    assert str(2 * 2 * (64 + 4)) in printed  # K and V, two heads, with scales


def test_latent_attention():
    names, _ = after(0, 1, 2, 3)
    assert names["y"].shape == (2, 1024, 512)
    assert names["cache"].lengths.tolist() == [1024, 1024]


def test_huggingface(tmp_path):
    path = save(tmp_path, "deepseek_v3", golden("deepseek_v3")[1])
    text = BLOCKS[4].text.replace("path/to/model", str(path))
    states = golden("deepseek_v3")[2][0][0]
    names = run([dataclasses.replace(BLOCKS[4], text=text)], hidden_states=states)
    np.testing.assert_allclose(names["y"], golden("deepseek_v3")[2][0][1], atol=1e-5)


def test_several_devices():
    names, printed = after(0, 1, 2, 5)
    assert names["out"].shape == (2, 300, 16, 64) and names["y"].shape == (2, 1024, 512)
    assert names["cache"].lengths.tolist() == [1024, 1024]
    assert "ring" in printed


@pytest.mark.aot
def test_report(capsys):
    run([BLOCKS[0], BLOCKS[6]])
    printed = capsys.readouterr().out
    assert "v5p" in printed and "MiB" in printed


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run([dataclasses.replace(BLOCKS[7], text="import axattn\n" + BLOCKS[7].text)])
    assert (tmp_path / "window.png").stat().st_size > 5_000
