"""Weights of the example model as one .npz: float16 arrays by path, and the `Config` as JSON."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.decoder import Config, Decoder

# Written by `python examples/train.py`.
TRAINED = pathlib.Path(__file__).with_name("decoder.npz")


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def save(path: pathlib.Path | str, model: Decoder) -> None:
    """Writes a model's parameters, rounded to float16."""
    fields = {k: v for k, v in dataclasses.asdict(model.config).items() if k != "dtype"}
    arrays = {
        _name(key): np.asarray(value[...], np.float16)
        for key, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    np.savez_compressed(path, config=json.dumps(fields), **arrays)


def load(
    path: pathlib.Path | str = TRAINED, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> Decoder:
    """The model that `save` wrote, with float32 parameters and activations of ``dtype``.

    Raises:
      ValueError: the file's arrays are not those of its configuration.
    """
    with np.load(path) as file:
        fields = json.loads(str(file["config"]))
        arrays = {name: file[name] for name in file.files if name != "config"}
    config = Config(**fields | {"windows": tuple(fields["windows"]), "dtype": dtype})
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    wanted = {_name(key): value.shape for key, value in nnx.to_flat_state(state)}
    found = {name: array.shape for name, array in arrays.items()}
    if wanted != found:
        differ = sorted(set(wanted.items()) ^ set(found.items()))
        raise ValueError(f"{path} does not fit {config}; the first difference is {differ[0]}")
    flat = [
        (key, value.replace(jnp.asarray(arrays[_name(key)], jnp.float32)))
        for key, value in nnx.to_flat_state(state)
    ]
    nnx.update(model, nnx.from_flat_state(flat))
    return model
