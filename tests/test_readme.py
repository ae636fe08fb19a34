"""The README's code runs as it is printed."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from tests import markdown
from tests.huggingface import golden, save

README = markdown.ROOT / "README.md"
BLOCKS = markdown.blocks(README, "python")

run = functools.partial(markdown.run, README)


def test_there_are_blocks():
    assert len(BLOCKS) == 8


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


def test_latent_attention():
    names = run([BLOCKS[0], BLOCKS[2], BLOCKS[3]])
    assert names["y"].shape == (2, 1024, 512)
    assert names["cache"].lengths.tolist() == [1024, 1024]


def test_huggingface(tmp_path):
    path = save(tmp_path, "deepseek_v3", golden("deepseek_v3")[1])
    text = BLOCKS[4].text.replace("path/to/model", str(path))
    states = golden("deepseek_v3")[2][0][0]
    names = run([dataclasses.replace(BLOCKS[4], text=text)], hidden_states=states)
    np.testing.assert_allclose(names["y"], golden("deepseek_v3")[2][0][1], atol=1e-5)


def test_several_devices(capsys):
    names = run([*BLOCKS[:3], BLOCKS[5]])
    assert names["out"].shape == (2, 300, 16, 64) and names["y"].shape == (2, 1024, 512)
    assert names["cache"].lengths.tolist() == [1024, 1024]
    assert "ring" in capsys.readouterr().out


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
