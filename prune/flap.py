"""FLAP: score what varies, and give back what does not (arXiv 2312.11983).

A removed input channel j changes an output by W_:j x_j. Its mean W_:j E[x_j] can be given back, by a bias or by what is
trained afterwards, so what is lost is the fluctuation about it.
"""

import torch
from torch import Tensor

from prune.groups import LayerShape
from prune.members import channel_sums, fold
from prune.saliency import check_reader, column_sums
from prune.slice import check_kept


def fluctuation(role: str, weight: Tensor, variance: Tensor, shape: LayerShape) -> Tensor:
    """Variance of each input of ``role`` ("o" or "down") times the squared norm of its column: fp64 [in].

    FLAP's weighted input feature variance. ``weight`` [out, in], ``variance`` [in] over tokens; a variance found as a
    difference of means may round to less than zero and is to be clamped by who found it. Raises PruneError for a role
    whose columns are not pruned, a shape that does not fit or a negative variance. Peak bytes: 16 * 256 * in.
    """
    check_reader(role, weight, variance, shape)
    return column_sums(weight, 2) * variance.to(torch.float64)


def flap(role: str, weight: Tensor, variance: Tensor, shape: LayerShape) -> Tensor:
    """Scores of the groups that ``role`` reads, to rank within a layer: fp64 [groups], sums of ``fluctuation``."""
    return fold(role, fluctuation(role, weight, variance, shape), shape)


def standardised(role: str, channels: Tensor, shape: LayerShape) -> Tensor:
    """Scores of groups that can be ranked across layers, and KV groups against FFN channels: fp64 [groups].

    ``channels`` [in] of one layer, from ``fluctuation``, are shifted and scaled to mean 0 and (unbiased) standard
    deviation 1; a group's score is the mean over its channels. So a layer keeps more the farther its best channels
    stand out, whatever its scale: FLAP's adaptive structure, AL-AM. A group then counts with what it costs, which
    differs between the kinds. (The released code squares the channels of attention first.) Channels that are all equal
    score 0. Raises PruneError for an unknown role or another number of channels.
    """
    values = channels.to(torch.float64)
    sizes = fold(role, torch.ones_like(values), shape)
    centred = values - values.mean()
    deviation = centred.square().sum().div(max(len(values) - 1, 1)).sqrt()
    return fold(role, torch.where(deviation == 0, 0.0, centred / deviation), shape) / sizes


def mean_bias(
    role: str, weight: Tensor, mean: Tensor, kept: Tensor, shape: LayerShape, bias: Tensor | None = None
) -> Tensor:
    """What the inputs that go add to the outputs of ``role`` ("o" or "down") on average, plus ``bias``: fp32 [out].

    FLAP's bias compensation: the sum of W_:j E[x_j] over the columns j that are not ``kept`` (int64, ascending). With
    it inputs that never vary are not missed. ``weight`` [out, in] before it is cut, ``mean`` [in] over tokens; sums are
    fp64. Raises PruneError for a role whose columns are not pruned, shapes that do not fit or indices out of order or
    bounds. Peak bytes: 16 * 256 * in.
    """
    check_reader(role, weight, mean.square(), shape)
    check_kept(kept, len(mean))
    gone = mean.to(torch.float64, copy=True).index_fill_(0, kept.to(mean.device), 0)
    found = channel_sums(lambda start, stop: weight[start:stop] * gone, len(weight), 0)
    return (found if bias is None else found + bias).float()
