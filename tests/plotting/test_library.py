from __future__ import annotations

import sys

import pytest

from axattn.plotting import _library


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[plot\]'"):
        _library.import_pyplot()


def test_with_matplotlib():
    assert _library.import_pyplot() is sys.modules["matplotlib.pyplot"]
