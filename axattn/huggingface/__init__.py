"""Attention layers of Hugging Face checkpoints, as axattn's layers.

::

    from axattn import huggingface

    config = huggingface.read_config(path)                 # a folder with config.json
    spec = huggingface.attention_spec(config, layer=0)
    layer = spec.linen()                                   # or spec.nnx(rngs=nnx.Rngs(0))
    params = huggingface.load(path, layers=[0])[0]         # from its .safetensors
    y = layer.apply({"params": params}, x, is_causal=spec.is_causal)

`load` needs safetensors (``pip install safetensors``, or the extra ``huggingface``);
`attention_params` takes any mapping of names to arrays. Nothing is downloaded.

Llama (4 for sequences of one chunk), Mistral and Mixtral, Gemma 1 to 3, Qwen 2 and 3 and their MoE,
Phi-3 (without LongRoPE), gpt-oss, Granite, OLMo 2, SmolLM3, GLM-4, Falcon (without ALiBi), DeepSeek
V2 and V3. What a configuration asks for beyond that is refused by name.
Both ways of writing config.json are read: ``rope_parameters`` (transformers 5), and ``rope_theta``
with ``rope_scaling``. What a configuration leaves out is what transformers takes it to be.
"""

from axattn.huggingface._files import load, read_config
from axattn.huggingface._spec import AttentionSpec, attention_spec
from axattn.huggingface._weights import attention_params

__all__ = ["AttentionSpec", "attention_params", "attention_spec", "load", "read_config"]
