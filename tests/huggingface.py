"""What transformers' models did, and folders as it saves them."""

from __future__ import annotations

import functools
import json
import pathlib

import numpy as np

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "huggingface.npz"


@functools.cache
def golden(model):
    """(config, tensors, inputs and outputs by layer)"""
    with np.load(GOLDENS) as archive:
        found = {
            name.removeprefix(f"{model}/"): archive[name]
            for name in archive.files
            if name.startswith(f"{model}/")
        }
    config = json.loads(found.pop("config").tobytes())
    passed = {
        int(name.split("/")[1]): (found.pop(name), found.pop(name.replace("inputs", "outputs")))
        for name in list(found)
        if name.startswith("inputs/")
    }
    return config, found, passed


def save(tmp_path, model, tensors, shards=1):
    """A folder as transformers saves a model."""
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text(json.dumps(golden(model)[0]))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, tmp_path / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path
