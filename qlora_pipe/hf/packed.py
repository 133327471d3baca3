"""Packed modules in the places of dense ones, in models that we build and in those that transformers loads.

Imported with the quantizer: only torch, and what is ours without transformers.
"""

from typing import Any

import torch
from torch import nn

from qlora_pipe.architectures import EMBEDDING, HEAD
from qlora_pipe.errors import UnsupportedModel
from quant.embedding import PackedEmbedding, TiedHead
from quant.linear import PackedLinear, PackedMatrix
from quant.storage import PackedShape


def packed_like(place: nn.Module, shape: PackedShape, dtype: torch.dtype) -> PackedMatrix:
    """What does, packed, the work of the linear map or embedding `place`; its buffers have no memory yet.

    `dtype`: of the rows of an embedding. Raises UnsupportedModel for an embedding that does more than look up and
    scale, QuantError for a shape that no packed module has.
    """
    if not isinstance(place, nn.Embedding):
        return PackedLinear(shape, device="meta")
    factor = getattr(place, "scalar_embed_scale", None)  # Gemma's
    if factor is None and type(place) is not nn.Embedding:
        raise UnsupportedModel(
            f"a packed embedding replaces nn.Embedding, found {type(place).__name__}; set decompose.embeddings to keep"
        )
    return PackedEmbedding(shape, dtype=dtype, factor=1.0 if factor is None else factor, device="meta")


def tie_head(model: Any) -> None:
    """Let the head of a transformers model read its packed embedding, and no weight be tied that is not there."""
    setattr(model, HEAD, TiedHead(model.get_submodule(EMBEDDING)))
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}
