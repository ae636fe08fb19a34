"""Meshes of simulated devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def mesh_of():
    """A function of the sizes of the axes "data", "model" and "context"."""

    def make(data=1, model=1, context=1):
        devices = np.array(jax.devices()[: data * model * context])
        return jax.sharding.Mesh(
            devices.reshape(data, model, context), ("data", "model", "context")
        )

    return make
