"""config.json and .safetensors of a folder, without reading what is not asked for."""

from __future__ import annotations

import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from axattn.huggingface.spec import text_config
from axattn.huggingface.weights import attention_params

INDEX = "model.safetensors.index.json"

# What numpy has no name for, and safetensors hands out through numpy.
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """What the folder's config.json holds.

    Args:
      path: a folder, as transformers saves a model.

    Raises:
      FileNotFoundError: the folder has no config.json.
      ValueError: it is no JSON.

    Example:
      >>> import json, pathlib, tempfile
      >>> from axattn import huggingface
      >>> config = json.dumps({"model_type": "llama"})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "config.json").write_text(config)
      ...     huggingface.read_config(folder)
      {'model_type': 'llama'}
    """
    return json.loads((pathlib.Path(path) / "config.json").read_text("utf-8"))


def load(
    path: str | os.PathLike, layers: Iterable[int] | None = None, *, dtype: Any = None
) -> dict[int, dict[str, Any]]:
    """Parameters of attention layers, by their index.

    Args:
      path: a folder with config.json and one or more .safetensors, as transformers saves a model.
        Of the files only these layers' tensors are read.
      layers: which; all by default.
      dtype: as in `attention_params`.

    Returns:
      layer -> its tree of numpy arrays, as `attention_params` gives it.

    Raises:
      FileNotFoundError: the folder has no config.json or no .safetensors.
      ImportError: safetensors is not installed.
      KeyError, ValueError, NotImplementedError: as `attention_params`.

    Example:
      >>> import json, pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from axattn import huggingface
      >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
      >>> config = dict(model_type="llama", num_hidden_layers=1, **sizes)
      >>> heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}  # of 8 features
      >>> tensors = {
      ...     f"model.layers.0.self_attn.{name}.weight": np.zeros((8 * n, 32), np.float32)
      ...     for name, n in heads.items()
      ... }
      >>> with tempfile.TemporaryDirectory() as folder:  # as transformers saves a model
      ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
      ...     save_file(tensors, pathlib.Path(folder, "model.safetensors"))
      ...     layers = huggingface.load(folder)
      >>> {name: p["kernel"].shape for name, p in layers[0].items()}
      {'query': (32, 4, 8), 'key': (32, 2, 8), 'value': (32, 2, 8), 'out': (4, 8, 32)}
    """
    config = read_config(path)
    if layers is None:
        layers = range(text_config(config)["num_hidden_layers"])
    tensors = SafeTensors(path)
    return {layer: attention_params(tensors, config, layer, dtype=dtype) for layer in layers}


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of a folder's .safetensors by name, each read when it is asked for."""

    def __init__(self, path: str | os.PathLike):
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError("to read checkpoints: pip install 'axattn[huggingface]'") from error

        self._open = safe_open
        folder = pathlib.Path(path)
        index = folder / INDEX
        if index.exists():
            names = json.loads(index.read_text("utf-8"))["weight_map"]
            self._files = {name: folder / file for name, file in names.items()}
            return
        self._files = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="np") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        if not self._files:
            raise FileNotFoundError(f"{folder} has no .safetensors")

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        with self._open(file, framework="np") as opened:
            kind = opened.get_slice(name).get_dtype()
            if kind not in _FLOAT8:
                return opened.get_tensor(name)
        return _raw(file, name, _FLOAT8[kind])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _raw(file: pathlib.Path, name: str, dtype: Any) -> np.ndarray:
    """A tensor's bytes by the file's header: its length, JSON, then the data."""
    with open(file, "rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        entry = json.loads(opened.read(size))[name]
        first, last = entry["data_offsets"]
        opened.seek(8 + size + first)
        return np.frombuffer(opened.read(last - first), dtype).reshape(entry["shape"])
