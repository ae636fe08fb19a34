"""The config.json and .safetensors of a folder; tensors are read when they are asked for."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import reprlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from axattn.huggingface._json_fields import COUNT_OR_0, Config
from axattn.huggingface._spec import read_text_config
from axattn.huggingface._weights import attention_params

INDEX = "model.safetensors.index.json"

# The first bytes of a pointer to a file that git-lfs has not fetched.
_LFS = b"version https://git-lfs"

# Dtypes that numpy lacks, so that safetensors does not return them as numpy arrays.
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read the config.json of a folder.

    Args:
      path: a folder, as transformers saves a model; or the file itself.

    Returns:
      The configuration as a dict.

    Raises:
      FileNotFoundError: there is no such folder (a name on the Hugging Face hub, for instance), or
        it has no config.json.
      ValueError: the file is no JSON, or no JSON object; the message has its name.
      TypeError: ``path`` is no path.

    Example:
      >>> import json, pathlib, tempfile
      >>> from axattn import huggingface
      >>> config = json.dumps({"model_type": "llama"})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "config.json").write_text(config)
      ...     huggingface.read_config(folder)
      {'model_type': 'llama'}
    """
    path = _check_path(path)
    return _read_object(path if path.is_file() else _check_folder(path) / "config.json")


def load(
    path: str | os.PathLike,
    layers: Iterable[int] | None = None,
    *,
    config: Config | str | os.PathLike | None = None,
    dtype: Any = None,
) -> dict[int, dict[str, Any]]:
    """Load the parameters of attention layers, by their index.

    Args:
      path: a folder with config.json and one or more .safetensors, as transformers saves a model.
        Of the files only these layers' tensors are read.
      layers: which; all by default.
      config: in place of the folder's config.json, a mapping or a path for `read_config`.
      dtype: as in `attention_params`.

    Returns:
      layer -> its tree of numpy arrays, as `attention_params` gives it.

    Raises:
      FileNotFoundError: there is no such folder (a name on the Hugging Face hub, for instance), or
        it has no config.json, no .safetensors or not one that its index names.
      ImportError: safetensors is not installed.
      KeyError: as `attention_params`; or a file does not have what the index says.
      ValueError: as `attention_params`; or a file that is cut off, a git-lfs pointer or otherwise
        not what its name says. The message has the file.
      TypeError, NotImplementedError: as `attention_params`.

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
    folder = _check_folder(_check_path(path))
    if config is None:
        config = read_config(folder)
    elif isinstance(config, str | os.PathLike):
        config = read_config(config)
    if layers is None:
        layers = range(read_text_config(config)["num_hidden_layers"])
    asked: Any = layers
    if isinstance(asked, str) or not isinstance(asked, Iterable):
        raise TypeError(f"layers takes an iterable of integers, got {asked!r}")
    layers = [int(COUNT_OR_0.check("layers", layer)) for layer in asked]
    tensors = SafeTensors(folder)
    return {layer: attention_params(tensors, config, layer, dtype=dtype) for layer in layers}


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors in a folder's .safetensors by name, each read when it is asked for."""

    def __init__(self, path: str | os.PathLike):
        try:
            import safetensors
        except ImportError as error:
            raise ImportError(
                f"reading checkpoints needs safetensors ({error}): pip install safetensors, "
                "or, in a checkout of axattn, pip install -e '.[huggingface]'"
            ) from error

        self._library = safetensors
        self._folder = pathlib.Path(path)
        self._index = self._folder / INDEX
        self._files = self._read_index() if self._index.exists() else self._scan_files()

    def _read_index(self) -> dict[str, pathlib.Path]:
        """Return the file of each tensor, by the folder's index."""
        names = _read_object(self._index).get("weight_map")
        if not isinstance(names, Mapping) or not all(isinstance(x, str) for x in names.values()):
            raise ValueError(f"{self._index} takes a weight_map of names to files")
        return {name: self._folder / file for name, file in names.items()}

    def _scan_files(self) -> dict[str, pathlib.Path]:
        """Return the file of each tensor, by the files' headers."""
        files: dict[str, pathlib.Path] = {}
        for file in sorted(self._folder.glob("*.safetensors")):
            with self._open(file) as opened:
                files |= dict.fromkeys(opened.keys(), file)
        if not files:
            raise FileNotFoundError(f"{self._folder} has no .safetensors")
        return files

    @contextlib.contextmanager
    def _open(self, file: pathlib.Path) -> Iterator[Any]:
        """Open a file by its library, whose errors do not name the file."""
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}, which {self._index} names")
        try:
            with self._library.safe_open(file, framework="np") as opened:
                yield opened
        except self._library.SafetensorError as error:
            raise ValueError(f"{file} {_diagnose(file)} ({error})") from error

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        with self._open(file) as opened:
            if name not in opened.keys():
                raise KeyError(f"no tensor {name} in {file}, where {self._index} says it is")
            kind = opened.get_slice(name).get_dtype()
            if kind not in _FLOAT8:
                return opened.get_tensor(name)
        return _read_raw_tensor(file, name, _FLOAT8[kind])

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _check_path(path: str | os.PathLike) -> pathlib.Path:
    """Return a pathlib path; raise TypeError for another type."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path takes a folder's path, got {path!r}")
    return pathlib.Path(path)


def _check_folder(path: pathlib.Path) -> pathlib.Path:
    """Return the path of a folder that exists."""
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"path takes a folder, got the file {path}")
    raise FileNotFoundError(
        f"there is no folder {str(path)!r}, and nothing is downloaded here: if it is a name on the "
        f"Hugging Face hub, huggingface_hub.snapshot_download({str(path)!r}) downloads it and "
        "returns the folder"
    )


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    """Read a file that holds a JSON object."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:  # of JSON, and of UTF-8
        raise ValueError(f"{file} {_diagnose(file, 'JSON')} ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} takes a JSON object, got {reprlib.repr(found)}")
    return found


def _diagnose(file: pathlib.Path, kind: str = "safetensors file") -> str:
    """Say why a file cannot be read as a ``kind``."""
    with open(file, "rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            return "is a git-lfs pointer to a file that was not fetched: `git lfs pull` does"
    return f"is no {kind}, or is cut off after {file.stat().st_size} bytes"


def _read_raw_tensor(file: pathlib.Path, name: str, dtype: Any) -> np.ndarray:
    """Read a tensor's bytes as ``dtype``. A file is its header's size, the header, the data."""
    with open(file, "rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        entry = json.loads(opened.read(size))[name]
        first, last = entry["data_offsets"]
        opened.seek(8 + size + first)
        return np.frombuffer(opened.read(last - first), dtype).reshape(entry["shape"])
