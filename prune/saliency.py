"""Scores of coupled groups: how much each KV head and each FFN channel of a layer seems to matter.

Every score is a dict {"kv": fp64 [kv_heads], "ffn": fp64 [ffn]}; larger means more important.
"""

from typing import Literal

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import LayerShape, pruned_dim, shape_of
from prune.members import MemberScores, channel_sums, fold, magnitudes


class GroupScores:
    """Magnitude scores of one layer, gathered one weight at a time so that only one dense weight is alive.

    Score of a group = sum over its member weights m of (squared entries of m inside the group) / (all
    squared entries of m). Dividing every weight by its own total makes members comparable whatever their
    size or scale: the kv scores of a layer add up to 4 (q, k, v, o) and the ffn scores to 3 (gate, up,
    down). A weight that is zero everywhere adds nothing. Groups and sums are those of LoRAPrune (arXiv
    2305.18403), magnitude variant; that method's released code divides by the L2 norm of the score vector
    instead.
    """

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape
        self._members = MemberScores(shape, norm=1)

    def add(self, role: str, weight: Tensor) -> None:
        """Account for ``weight`` [out, in], floating point of any width, sums in fp64.

        Raises PruneError for an unknown role, a role given twice, or a shape that is not the role's. Peak
        bytes: at most 16 * 256 * in on top of the weight.
        """
        expected = shape_of(role, self._shape)
        if tuple(weight.shape) != expected:
            raise PruneError(f"{role} must have shape {expected}, found {tuple(weight.shape)}")
        sums = channel_sums(lambda start, stop: magnitudes(weight[start:stop], 2), expected[0], pruned_dim(role))
        self._members.add(role, fold(role, sums, self._shape))

    def scores(self) -> dict[str, Tensor]:
        """The scores, on the device of the weights. Non-finite weights give NaN, which ``select`` refuses.

        Raises PruneError when a weight is missing: a group scored on some of its members is not comparable.
        """
        return self._members.scores()


def activation(
    role: str, weight: Tensor, input_squares: Tensor, shape: LayerShape, output_squares: Tensor | None = None
) -> Tensor:
    """Scores of the groups that ``role`` ("o" for KV groups, "down" for FFN channels) reads, fp64 [groups].

    Score of a group = sum over its columns j of E[x_j^2] * ||W_:j||^2: the expected squared change of the layer's
    output when the group goes, if inputs are uncorrelated. It is Wanda's weight-times-activation score (arXiv
    2306.11695), squared and summed over what leaves together. ``weight`` [out, in]; ``input_squares`` [in], the mean
    square of each input. ``output_squares`` [out], the mean square of each output's gradient, weighs the output's
    change by what it costs: then scores of different layers and kinds compare, for they estimate one loss (its second
    order, with a diagonal Fisher). Raises PruneError for a role whose columns are not pruned or a shape that does not
    fit. Peak bytes: 16 * 256 * in.
    """
    check_reader(role, weight, input_squares, shape)
    return fold(role, column_sums(weight, 2, output_squares) * input_squares.to(torch.float64), shape)


def wanda(
    role: str, weight: Tensor, input_squares: Tensor, shape: LayerShape, output_squares: Tensor | None = None
) -> Tensor:
    """Scores of the groups that ``role`` ("o" or "down") reads, as Wanda-sp gives them, fp64 [groups].

    Score of a group = sum over its columns j and all rows i of |W_ij| * sqrt(E[x_j^2]). Wanda (arXiv 2306.11695) takes
    the input's norm over all tokens, and its structured form (FLAP, arXiv 2312.11983) the mean over rows: both differ
    by a constant factor. Arguments, errors and peak bytes as for ``activation``.
    """
    check_reader(role, weight, input_squares, shape)
    return fold(role, column_sums(weight, 1, output_squares) * input_squares.to(torch.float64).sqrt(), shape)


def random(shape: LayerShape, generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform scores in [0, 1) on the generator's device: the random pruner of LoRAM (arXiv 2502.13533)."""
    return {
        kind: torch.rand(shape.group_count(kind), generator=generator, dtype=torch.float64, device=generator.device)
        for kind in ("kv", "ffn")
    }


def column_sums(weight: Tensor, power: Literal[1, 2], output_squares: Tensor | None = None) -> Tensor:
    """Magnitudes (power 1) or squares (2) of a weight [out, in] summed over its rows: fp64 [in].

    Rows are scaled by the roots of ``output_squares`` [out] first. Raises PruneError unless these fit and are not
    negative.
    """
    if output_squares is None:
        return channel_sums(lambda start, stop: magnitudes(weight[start:stop], power), weight.shape[0], 1)
    if output_squares.shape != weight.shape[:1] or bool((output_squares < 0).any()):
        raise PruneError(
            f"expected {weight.shape[0]} mean squares of gradients, none negative, found {tuple(output_squares.shape)}"
        )
    scale = magnitudes(output_squares, 1).sqrt()[:, None] if power == 1 else magnitudes(output_squares, 1)[:, None]
    return channel_sums(
        lambda start, stop: magnitudes(weight[start:stop], power) * scale[start:stop], weight.shape[0], 1
    )


def check_reader(role: str, weight: Tensor, moments: Tensor, shape: LayerShape) -> None:
    """Raise PruneError unless ``role`` reads groups (o, down) and ``moments`` [in], none negative, fit its weight."""
    expected = shape_of(role, shape)
    if pruned_dim(role) != 1 or tuple(weight.shape) != expected or tuple(moments.shape) != expected[1:]:
        raise PruneError(
            f"expected o or down with a weight {expected} and its {expected[1]} input moments, found {role} with "
            f"{tuple(weight.shape)} and {tuple(moments.shape)}"
        )
    if bool((moments < 0).any()):
        raise PruneError(f"{role}: mean squares and variances are not negative, found {float(moments.min()):g}")
