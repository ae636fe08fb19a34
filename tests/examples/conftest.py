from __future__ import annotations

import pytest

from tests import quick


@pytest.fixture(scope="module")
def quick_to_compile():
    with quick.to_compile():
        yield


@pytest.fixture(scope="session")
def trained():
    """The model whose weights are in the repository."""
    from examples import checkpoint

    return checkpoint.load()
