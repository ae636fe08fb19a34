from __future__ import annotations

import pytest

from examples import checkpoint


@pytest.fixture(scope="session")
def trained():
    """The model whose weights are in the repository."""
    return checkpoint.load()
