from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def trained():
    """The model whose weights are in the repository."""
    from examples import checkpoint

    return checkpoint.load()
