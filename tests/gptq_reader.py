"""A reader of GPTQ checkpoints, written from the description of the format with numpy alone: slow, and only for tests.

Words are read as one stream of bits along the packed axis, lowest bit first; what was packed along rows of the stored
matrix is read column by column.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

Integers = npt.NDArray[np.int64]
ADDED = {"gptq": 1, "gptq_v2": 0}


def read_stream(words: Tensor, bits: int) -> Integers:
    """Codes of every row of int32 words."""
    octets = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)
    digits = np.unpackbits(octets, axis=1, bitorder="little").astype(np.int64)
    return digits.reshape(len(digits), -1, bits) @ (1 << np.arange(bits))


def read_map(
    tensors: Mapping[str, Tensor], name: str, bits: int, version: str
) -> tuple[Integers, Integers, npt.NDArray[np.float64]]:
    """Codes [out, in], zero points [groups, out] and the float64 weight [out, in] of one linear map."""
    codes = read_stream(tensors[f"{name}.qweight"].T, bits)
    zeros = read_stream(tensors[f"{name}.qzeros"], bits) + ADDED[version]
    scales = tensors[f"{name}.scales"].numpy().astype(np.float64)
    group = tensors[f"{name}.g_idx"].numpy()
    weight = scales[group] * (codes.T - zeros[group])
    return codes, zeros, weight.T
