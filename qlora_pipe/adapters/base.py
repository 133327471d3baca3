"""The weights that an adapter is added to: of a Hugging Face folder, or of one that is packed."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qlora_pipe.artifacts.layout import DTYPE_CODE
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.errors import UnsupportedModel, WeightError
from qlora_pipe.packed_config import METHOD, Packing, from_json
from qlora_pipe.sources import read_object
from quant.exceptions import QuantError
from quant.linear import dense_weight
from quant.storage import PackedShape


class Base:
    """A model folder, read one weight at a time.

    Raises SourceError for a folder that is not whole, UnsupportedModel for one that others packed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = read_object(folder / "config.json", "a model folder").get("quantization_config")
        if settings and (not isinstance(settings, dict) or settings.get("quant_method") != METHOD):
            raise UnsupportedModel(
                f"{folder}: expected plain weights or those that decompose packed, found a quantization_config of "
                "another kind; give the unquantised model"
            )
        self._packings: Mapping[str, Packing] = from_json(settings) if settings else {}
        self._reader = TensorReader(folder)

    @property
    def packed(self) -> bool:
        """Whether some of its weights are packed."""
        return bool(self._packings)

    def check(self, name: str, sides: tuple[int, int]) -> None:
        """Raises WeightError if the folder has no weight of that name and of these sides, (out, in). Reads none."""
        expected = self._expected(name, sides)
        found = {tensor: self._reader.locations[tensor].spec for tensor in expected if tensor in self._reader}
        if not found:
            raise WeightError(
                f"{self.folder}: it has no linear map {name}, which the adapter is for; give the model that it "
                "was trained on"
            )
        for tensor, (dtype, shape) in expected.items():
            spec = found.get(tensor)
            if spec is None or spec.shape != shape or (dtype and spec.dtype != dtype):
                held = "none" if spec is None else f"{spec.dtype} {list(spec.shape)}"
                raise WeightError(
                    f"{self.folder}: expected {tensor} {list(shape)}, as the adapter's factors have it, found {held}; "
                    "give the model that it was trained on"
                )

    def weight(self, name: str, sides: tuple[int, int]) -> Tensor:
        """fp32 [out, in], unpacked if it is packed; raises WeightError for NaN or infinity. Peak bytes: 4 x out x in,
        and what is stored."""
        shape = self._shape(name, sides)
        if shape is None:
            return self._reader.read_float(f"{name}.weight")
        weight = dense_weight({buffer: self._reader.read(f"{name}.{buffer}") for buffer in shape.buffers()}, shape)
        if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
            raise WeightError(f"{self.folder}: the packed weight {name} holds NaN or infinity; decompose again")
        return weight

    def _shape(self, name: str, sides: tuple[int, int]) -> PackedShape | None:
        packing = self._packings.get(name, Packing())
        if packing.choice is None:
            return None
        return PackedShape(sides[1], sides[0], packing.choice, packing.transposed)

    def _expected(self, name: str, sides: tuple[int, int]) -> dict[str, tuple[str | None, tuple[int, ...]]]:
        """dtype code, None for any, and shape of the tensors that make up a weight."""
        shape = self._shape(name, sides)
        if shape is None:
            return {f"{name}.weight": (None, sides)}
        try:
            buffers = shape.buffers()
        except QuantError as error:
            raise WeightError(
                f"{self.folder}: {name} cannot be {sides[0]} x {sides[1]}, as the adapter's factors have it ({error}); "
                "give the model that it was trained on"
            ) from error
        return {f"{name}.{buffer}": (DTYPE_CODE[dtype], size) for buffer, (dtype, size) in buffers.items()}
