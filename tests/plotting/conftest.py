from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_windows():
    import matplotlib
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    plt.close("all")
    matplotlib.use(before)
