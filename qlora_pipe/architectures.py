"""Decoder families as data: which tensors a layer has, which of them are linear maps, and where biases live.

Adding a family is adding a row to FAMILIES. A checkpoint with a tensor that its row does not explain is refused.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prune.exceptions import PruneError
from prune.groups import ROLES, LayerShape, shape_of
from qlora_pipe.errors import UnsupportedModel

MODULE = {role: f"self_attn.{role}_proj" for role in "qkvo"} | {
    role: f"mlp.{role}_proj" for role in ("gate", "up", "down")
}
"""Path of each linear map inside a layer."""

SITE = dict.fromkeys("qkv", "attention_input") | {
    "o": "attention_output",
    "gate": "ffn_input",
    "up": "ffn_input",
    "down": "ffn_hidden",
}
"""Which of a layer's distinct inputs each linear map reads."""

SITES = tuple(dict.fromkeys(SITE.values()))

_ROLE = {module: role for role, module in MODULE.items()}
_LAYERS = "model.layers."

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
_IGNORED = ("rotary_emb.inv_freq",)
_MOST_LAYERS = 10_000
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """What tells one Llama-like family from another."""

    model_types: tuple[str, ...]
    norms: tuple[str, ...] = _TWO_NORMS
    head_norms: bool = False
    bias_roles: tuple[str, ...] = ()
    attention_bias_key: bool = False
    mlp_bias_key: bool = False
    tied_by_default: bool = False
    head_dim_default: int | None = None


FAMILIES = (
    Family(("llama",), attention_bias_key=True, mlp_bias_key=True),
    Family(("mistral",)),
    Family(("qwen2",), bias_roles=("q", "k", "v")),
    Family(("qwen3",), head_norms=True, attention_bias_key=True, head_dim_default=128),
    Family(("gemma",), attention_bias_key=True, tied_by_default=True, head_dim_default=256),
    Family(("gemma2",), norms=_FOUR_NORMS, attention_bias_key=True, tied_by_default=True, head_dim_default=256),
    Family(
        ("gemma3_text",),
        norms=_FOUR_NORMS,
        head_norms=True,
        attention_bias_key=True,
        tied_by_default=True,
        head_dim_default=256,
    ),
)


@dataclass(frozen=True)
class Architecture:
    """A model's structure, read from its config.json; `layers` hold one shape each (they may differ)."""

    model_type: str
    family: Family
    vocab: int
    layers: tuple[LayerShape, ...]
    tied: bool
    biased: frozenset[str]

    @property
    def hidden(self) -> int:
        return self.layers[0].hidden

    def with_layers(self, layers: Sequence[LayerShape]) -> "Architecture":
        """The same with other widths."""
        return replace(self, layers=tuple(layers))

    def linears(self) -> Iterator[tuple[int, str, str]]:
        """(layer, role, module name) of every linear map of the blocks, in the order of computation."""
        for layer in range(len(self.layers)):
            for role in ROLES:
                yield layer, role, linear_name(layer, role)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear map of the blocks, by module name."""
        return {name: shape_of(role, self.layers[layer]) for layer, role, name in self.linears()}

    def with_linear_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> "Architecture":
        """The same with linear maps of the given (out, in), where they differ: inverse of `linear_shapes`.

        Raises UnsupportedModel if they are not those of layers with whole KV groups and FFN channels taken out.
        """
        wanted = self.linear_shapes() | dict(shapes)
        layers = []
        for layer, shape in enumerate(self.layers):
            kv_heads = wanted[linear_name(layer, "k")][0] // shape.head_dim
            heads, ffn = kv_heads * shape.queries_per_kv, wanted[linear_name(layer, "gate")][0]
            try:
                layers.append(replace(shape, heads=heads, kv_heads=kv_heads, ffn=ffn))
            except PruneError as error:
                raise UnsupportedModel(f"layer {layer} cannot have linear maps of these sides: {error}") from error
        found = self.with_layers(layers)
        implied = found.linear_shapes()
        for name, sides in wanted.items():
            if name not in implied:
                raise UnsupportedModel(f"{name}: expected a linear map of a block, found none of that name")
            if sides != implied[name]:
                raise UnsupportedModel(
                    f"{name}: expected sides {list(implied[name])}, which the other maps of its layer imply, "
                    f"found {list(sides)}"
                )
        return found

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the dense checkpoint."""
        found: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (self.vocab, self.hidden)}
        for layer, shape in enumerate(self.layers):
            for role in ROLES:
                name, (rows, columns) = linear_name(layer, role), shape_of(role, shape)
                found[f"{name}.weight"] = (rows, columns)
                if role in self.biased:
                    found[f"{name}.bias"] = (rows,)
            prefix = f"{_LAYERS}{layer}"
            for norm in self.family.norms:
                found[f"{prefix}.{norm}.weight"] = (self.hidden,)
            if self.family.head_norms:
                found[f"{prefix}.self_attn.q_norm.weight"] = (shape.head_dim,)
                found[f"{prefix}.self_attn.k_norm.weight"] = (shape.head_dim,)
        found[f"{FINAL_NORM}.weight"] = (self.hidden,)
        if not self.tied:
            found[f"{HEAD}.weight"] = (self.vocab, self.hidden)
        return found

    def others(self) -> dict[str, tuple[int, ...]]:
        """The tensors that are no linear map of a block: embeddings, norms, head."""
        inside = {f"{name}.{kind}" for _, _, name in self.linears() for kind in ("weight", "bias")}
        return {name: shape for name, shape in self.tensors().items() if name not in inside}

    def site_width(self, layer: int, site: str) -> int:
        """Features of one of a layer's distinct inputs."""
        return shape_of(next(role for role in ROLES if SITE[role] == site), self.layers[layer])[1]

    def linear_weights(self) -> int:
        """Number of weights of the block linears, what `bits per weight` is divided by."""
        sizes = (shape_of(role, shape) for shape in self.layers for role in ROLES)
        return sum(rows * columns for rows, columns in sizes)

    def block_parameters(self) -> int:
        """Number of parameters of the blocks: weights, biases and norms."""
        return sum(math.prod(shape) for name, shape in self.tensors().items() if name.startswith(_LAYERS))


def linear_name(layer: int, role: str) -> str:
    """Full module name of a linear map, as in the checkpoint."""
    return f"{_LAYERS}{layer}.{MODULE[role]}"


def place_of(name: str) -> tuple[int, str]:
    """(layer, role) of the linear map that `linear_name` calls `name`."""
    layer, _, module = name.removeprefix(_LAYERS).partition(".")
    return int(layer), _ROLE[module]


def covariance_name(layer: int, site: str) -> str:
    """Name of the stored covariance of one of a layer's distinct inputs."""
    return f"model.layers.{layer}.{site}.covariance"


def from_config(config: Mapping[str, Any]) -> Architecture:
    """The Architecture a config.json describes; raises UnsupportedModel naming what is not understood."""
    kind = config.get("model_type")
    family = next((row for row in FAMILIES if kind in row.model_types), None)
    if family is None:
        known = ", ".join(name for row in FAMILIES for name in row.model_types)
        raise UnsupportedModel(
            f"model_type {kind!r} is not supported; supported are {known}. A further Llama-like family is one row "
            "in qlora_pipe/architectures.py"
        )
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or family.head_dim_default or hidden // heads)
        ffn, count = int(config["intermediate_size"]), int(config["num_hidden_layers"])
        vocab = int(config["vocab_size"])
    except KeyError as error:
        raise UnsupportedModel(f"config.json of a {kind} model: expected the usual sizes, found no {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UnsupportedModel(f"config.json of a {kind} model: expected sizes as numbers, found {error}") from error
    if min(hidden, heads, kv_heads, head_dim, ffn, count, vocab) < 1 or heads % kv_heads or count > _MOST_LAYERS:
        raise UnsupportedModel(f"config.json: {heads} heads on {kv_heads} KV heads, {count} layers: not a model")
    shape = LayerShape(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn)
    biased = set(family.bias_roles)
    if family.attention_bias_key and config.get("attention_bias"):
        biased |= {"q", "k", "v", "o"}
    if family.mlp_bias_key and config.get("mlp_bias"):
        biased |= {"gate", "up", "down"}
    return Architecture(
        model_type=str(kind),
        family=family,
        vocab=vocab,
        layers=(shape,) * count,
        tied=bool(config.get("tie_word_embeddings", family.tied_by_default)),
        biased=frozenset(biased),
    )


def check_tensors(architecture: Architecture, found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a checkpoint's tensor names and shapes with the description; raises UnsupportedModel."""
    expected = architecture.tensors()
    for name, shape in expected.items():
        if name not in found:
            raise UnsupportedModel(f"the checkpoint has no tensor {name}, which a {architecture.model_type} model has")
        if tuple(found[name]) != shape:
            raise UnsupportedModel(f"tensor {name}: config.json implies shape {shape}, found {tuple(found[name])}")
    allowed = {f"{HEAD}.weight"} if architecture.tied else set()
    odd = [name for name in found if name not in expected and name not in allowed and not name.endswith(_IGNORED)]
    if odd:
        raise UnsupportedModel(
            f"the checkpoint has {len(odd)} tensors that the description of {architecture.model_type} does not "
            f"explain, first {min(odd)}; the model would not be treated whole, so it is refused"
        )
