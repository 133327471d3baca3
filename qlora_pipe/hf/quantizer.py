"""The transformers plug-in: packed folders load by stock `from_pretrained`, and stay packed.

Imported by qlora_pipe.hf.registration when transformers' table of quantizers is there, possibly while the rest of
transformers is still being imported: this file may import only what that table has imported already.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_pipe.architectures import EMBEDDING, HEAD, from_config
from qlora_pipe.artifacts.headers import read_header
from qlora_pipe.artifacts.layout import DTYPE_CODE, TensorSpec
from qlora_pipe.errors import SourceError
from qlora_pipe.hf.packed import packed_like, tie_head
from qlora_pipe.packed_config import METHOD, Packing, from_json, to_json
from quant.exceptions import QuantError
from quant.linear import PackedMatrix
from quant.storage import PackedShape


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder; raises SourceError if it is not one that this release writes."""

    def __init__(self, **body: Any) -> None:
        self.quant_method = METHOD
        self.packings = from_json(body)

    def to_dict(self) -> dict[str, Any]:
        return to_json(self.packings)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts packed modules, and dense ones of other sides, where the stock architecture has linear maps and embeddings;
    transformers loads their tensors like any other.

    `dtype` of from_pretrained is that of activations and of what is not packed; buffers keep their own. Peak bytes:
    the packed model.
    """

    # There is nothing here that quantises: an unpacked checkpoint with this config is refused.
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        packings = self.quantization_config.packings
        _check_sides(model.config, packings)
        for name, packing in packings.items():
            packed = _packed(model, name, packing)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed)
        if model.config.tie_word_embeddings and HEAD in packings:
            raise SourceError(f"quantization_config packs {HEAD}, but config.json ties it to the embedding")
        if model.config.tie_word_embeddings and EMBEDDING in packings:
            tie_head(model)
        if checkpoint_files is not None:
            _check_tensors(model, checkpoint_files)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top train; the packed map itself is constant."""
        return True


def _check_sides(config: Any, packings: Mapping[str, Packing]) -> None:
    """Raise SourceError if maps have sides of their own that no pruned layers of the model would have.

    Attention reads the numbers of heads off the tensors, so a model of such maps might run, and mean nothing.
    """
    sides = {name: packing.sides for name, packing in packings.items() if packing.sides is not None}
    if not sides:
        return
    try:
        from_config(config.to_dict()).with_linear_shapes(sides)
    except SourceError as error:
        raise SourceError(f"sides in quantization_config: {error}; fetch the folder's config.json again") from error


def _packed(model: nn.Module, name: str, packing: Packing) -> nn.Module:
    """What takes the place of module `name`, without memory; raises SourceError if nothing can."""
    try:
        place = model.get_submodule(name)
    except AttributeError:
        place = None
    if isinstance(place, nn.Linear):
        sides, bias = (place.out_features, place.in_features), packing.bias or place.bias is not None
    elif isinstance(place, nn.Embedding) and packing.choice is not None and not packing.bias:
        sides, bias = (place.num_embeddings, place.embedding_dim), False
    else:
        raise SourceError(
            f"quantization_config speaks of {name}, but {type(model).__name__} has no linear map there, and no "
            "embedding that it could be; load the folder with AutoModelForCausalLM, and keep its config.json as it was "
            "written"
        )
    rows, columns = packing.sides or sides
    if packing.choice is None:
        return nn.Linear(columns, rows, bias, device="meta", dtype=place.weight.dtype)
    shape = PackedShape(columns, rows, packing.choice, packing.transposed, bias)
    try:
        return packed_like(place, shape, place.weight.dtype)
    except QuantError as error:
        raise SourceError(f"quantization_config does not fit {name}: {error}") from error


def _check_tensors(model: Any, files: list[str]) -> None:
    """Every tensor of `model` is in `files`, packed ones in their own dtype, and no bias it lacks; SourceError before
    any is read.

    transformers itself would draw a missing tensor at random, leave a bias out, and say so in a warning.
    """
    found = {name: place.spec for file in files for name, place in read_header(Path(file)).items()}
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
    state = model.state_dict()
    for name in found.keys() - state.keys():
        if name.endswith(".bias"):
            raise SourceError(f"{files[0]}: config.json has no place for the tensor {name}; fetch the folder again")
    for name, tensor in state.items():
        if name not in found:
            if name in model.all_tied_weights_keys:
                continue
            raise SourceError(f"{files[0]}: expected a tensor {name}, found none of that name; fetch the folder again")
        expected = TensorSpec(_code(tensor.dtype), tuple(tensor.shape))
        if name.rpartition(".")[0] not in packed:
            expected = TensorSpec(found[name].dtype, expected.shape)
        if found[name] != expected:
            raise SourceError(
                f"{files[0]}: tensor {name}: quantization_config implies {expected}, found {found[name]}; "
                "fetch the folder again"
            )


def _code(dtype: torch.dtype) -> str:
    return DTYPE_CODE[str(dtype).removeprefix("torch.")]
