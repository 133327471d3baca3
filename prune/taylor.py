"""First-order scores: what the loss changes by, to first order, when a group is set to zero."""

from typing import Literal

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import LayerShape, pruned_dim, shape_of
from prune.members import Rows, at_least_fp32, channel_sums, fold, magnitudes, rows_of


@torch.no_grad()
def taylor_sums(weight: Tensor | Rows, grad: Tensor, dim: int, *, power: Literal[1, 2] = 1) -> Tensor:
    """|G o W|^power summed onto one axis: fp64 [out] for ``dim`` 0, [in] for ``dim`` 1.

    ``grad`` [out, in] is the true dloss/dW; ``weight`` [out, in] or made by rows. Power 1 is the element-wise
    first-order score of LLM-Pruner (arXiv 2305.11627), without its second-order variant; squares are what LoRAPrune
    writes. Products are at least fp32, sums fp64. Raises PruneError for shapes that do not fit, another axis or power.
    Peak bytes: 20 * 256 * in.
    """
    if grad.ndim != 2:
        raise PruneError(f"expected a gradient [out, in], found {tuple(grad.shape)}")
    out, fan_in = grad.shape
    rows = rows_of(weight, (out, fan_in))

    def entries(start: int, stop: int) -> Tensor:
        return magnitudes(at_least_fp32(rows(start, stop)) * grad[start:stop], power)

    return channel_sums(entries, out, dim)


def taylor(role: str, weight: Tensor | Rows, grad: Tensor, shape: LayerShape, *, power: Literal[1, 2] = 1) -> Tensor:
    """``taylor_sums`` over the groups of ``role``: fp64 [groups], ready for ``MemberScores``.

    Raises PruneError as it does, and for an unknown role or the gradient of another weight.
    """
    expected = shape_of(role, shape)
    if tuple(grad.shape) != expected:
        raise PruneError(f"{role} needs a gradient {expected}, found {tuple(grad.shape)}")
    return fold(role, taylor_sums(weight, grad, pruned_dim(role), power=power), shape)


def gates(role: str, moments: Tensor, shape: LayerShape) -> Tensor:
    """Scores of groups from the gradients of gates at the inputs of ``role`` ("o" or "down"): fp64 [groups].

    A gate of 1 on channel j has dloss/dgate = sum over tokens of x_j dloss/dx_j, which needs no gradient of a weight
    and equals the signed sum of G o W over column j. ``moments`` are these sums, [in], or [samples, in] to tell samples
    apart. One gate on a whole group has the sum of its channels' gradients; a score is the absolute value of that sum,
    averaged over samples, which then do not cancel each other.

    Raises PruneError for a role whose columns are not pruned, another number of channels, or no sample.
    """
    width = shape_of(role, shape)[1]
    if pruned_dim(role) != 1 or moments.ndim not in (1, 2) or moments.shape[-1] != width or not moments.numel():
        raise PruneError(
            f"expected o or down with gate moments [{width}] or [samples, {width}], found {role} with "
            f"{tuple(moments.shape)}"
        )
    samples = moments.to(torch.float64).reshape(-1, width)
    return fold(role, samples.T, shape).abs().mean(dim=1)
