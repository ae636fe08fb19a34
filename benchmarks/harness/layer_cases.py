"""What ``layer_bench.py`` measures: layers of published models, with every implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

BASELINE = "einsum"
DIRECTIONS = ("fwd", "fwd+bwd")

# How many key/value heads each layer has; None: what the model has.
LAYERS = {
    "MultiHeadAttention": "heads",
    "SelfAttention": "heads",
    "GroupedQueryAttention": "kv_heads",
    "MultiQueryAttention": 1,
    "LatentAttention": None,
}

FORMS = ("naive", "absorbed")


@dataclasses.dataclass(frozen=True)
class Latent:
    """Sizes of a latent attention layer; see `axattn.latent`."""

    kv_lora_rank: int = 512
    q_lora_rank: int = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of an attention layer and its input.

    Attributes:
      hidden: E. It need not be heads x head_dim: DeepSeek-V3's 128 heads of 128 read 7168 features.
      kv_heads: of its grouped-query layer.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    seq_len: int
    batch: int
    latent: Latent = Latent()

    @property
    def size(self) -> str:
        return (
            f"hidden {self.hidden}, {self.heads} heads of {self.head_dim}, "
            f"{self.batch} x {self.seq_len} tokens"
        )


MODELS = {
    model.name: model
    for model in (
        Model("deepseek-v3", 7168, 128, 8, 128, 2048, 2),
        Model("llama-3-70b", 8192, 64, 8, 128, 4096, 1),
        Model("llama-3-405b", 16384, 128, 8, 128, 2048, 1),
        Model("tiny", 128, 8, 2, 16, 256, 2, Latent(32, 48, 16, 8, 16)),
    )
}

# Of the sweeps: a grouped-query layer of heads of 128, eight to a key/value head.
SWEEP_LENGTHS = (512, 1024, 2048, 4096, 8192)
SWEEP_HIDDEN = (4096, 8192, 12288, 16384)


def sweep(name: str, lengths: Sequence[int], hidden: Sequence[int]) -> Iterator[Model]:
    """The models of a sweep, ``"length"`` at the first hidden size or ``"hidden"`` at T = 2048."""
    if name == "length":
        sizes = [(length, hidden[0]) for length in lengths]
    else:
        sizes = [(2048, size) for size in hidden]
    for length, size in sizes:
        heads = size // 128
        yield Model(f"{name} sweep", size, heads, max(1, heads // 8), 128, length, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell's question.

    Attributes:
      model: the sizes.
      layer: of `LAYERS`.
      implementation: `BASELINE`, of axattn, ``"default"`` (axattn's own choice), or a peer's.
      dtype: of parameters and activations.
      direction: of `DIRECTIONS`.
      form: of `FORMS`, for LatentAttention.
      heads_at_once: False: one key/value head's group after the other.
      fused_qkv: one product for queries, keys and values.
    """

    model: Model
    layer: str
    implementation: str
    dtype: str
    direction: str = "fwd"
    form: str | None = None
    heads_at_once: bool = True
    fused_qkv: bool = False

    @property
    def kv_heads(self) -> int | None:
        """Of the layer; None for a latent one."""
        named = LAYERS[self.layer]
        return getattr(self.model, named) if isinstance(named, str) else named

    @property
    def question(self) -> tuple:
        """What is shared with the cells that this one is compared with."""
        return (self.model, self.layer, self.dtype, self.direction)


def cases(
    model: Model, layer: str, implementations: Sequence[str], dtype: str, direction: str
) -> Iterator[Case]:
    """A layer with each implementation; a latent one's in both forms, the baseline's in one."""
    for name in implementations:
        forms = (None,) if layer != "LatentAttention" else FORMS
        if name in (BASELINE, "default"):
            forms = forms[:1]
        for form in forms:
            yield Case(model, layer, name, dtype, direction, form)


def optimisations(
    model: Model, dtype: str, direction: str, implementation: str
) -> dict[str, list[Case]]:
    """What single decisions are worth: cases that differ in one, the costly one first."""
    grouped = Case(model, "GroupedQueryAttention", implementation, dtype, direction)

    def with_kv_heads(count: int) -> Case:
        return dataclasses.replace(grouped, model=dataclasses.replace(model, kv_heads=count))

    counts = [n for n in (8, 4, 2, 1) if model.heads % n == 0]
    return {
        "heads": [dataclasses.replace(grouped, heads_at_once=False), grouped],
        "projections": [grouped, dataclasses.replace(grouped, fused_qkv=True)],
        "kv heads": [with_kv_heads(n) for n in counts],
    }
