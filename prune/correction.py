"""Make up in an adapter for the difference between the weight it was trained on and the one it is put on.

Source: EMLoC, arXiv 2506.12015, in (out, in) form. For differences that should not be felt, such as the noise of
quantisation; never for what was trained to be different.
"""

import torch
from torch import Tensor

from prune.exceptions import PruneError

LIMIT = 3.0
"""Mean size of a correction, relative to the factor it corrects, of every direction of the inputs (EMLoC, lambda)."""


@torch.no_grad()
def correct_adapter(a: Tensor, b: Tensor, difference: Tensor, strength: float, limit: float = LIMIT) -> Tensor:
    """B less what ``difference`` [out, in], the new weight minus the one that was trained on, does to the inputs that
    A tells apart: fp32 [out, r] from a [r, in] and b [out, r], of an update strength * B A.

    With A = U S V' the thin SVD, D V / strength is the correction of B U S, column by column, each no larger than
    ``limit`` times what it corrects in the mean. Where nothing is limited the corrected layer does what the trained one
    did for every input in the row space of A, and B is B - D A+ / strength. Directions that A does not have are left
    alone. Raises PruneError for shapes that disagree.
    Peak bytes: a few times the factors, in fp64.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or difference.shape != (b.shape[0], a.shape[1]):
        raise PruneError(
            f"expected a difference [out, in] and factors a [r, in] and b [out, r], found {tuple(difference.shape)}, "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    directions, sizes, inputs = torch.linalg.svd(a.double(), full_matrices=False)
    there = sizes > sizes.max() * max(a.shape) * torch.finfo(torch.float32).eps
    wanted = (difference @ inputs.T.to(difference.dtype)).double() / strength
    rotated = (b.double() @ directions) * sizes
    allowed, found = limit * rotated.abs().mean(dim=0), wanted.abs().mean(dim=0)
    wanted *= torch.where(found > allowed, allowed / found, 1.0)
    back = torch.where(there, 1 / sizes, 0.0)
    corrected: Tensor = b.double() - (wanted * back) @ directions.T
    return corrected.float()


@torch.no_grad()
def within_limit(a: Tensor, b: Tensor, corrected: Tensor, limit: float = LIMIT) -> bool:
    """Whether b [out, r] was moved to ``corrected`` [out, r] by no more than ``correct_adapter`` allows, in every
    direction of a [r, in], but for rounding to fp32."""
    directions = torch.linalg.svd(a.double(), full_matrices=False)[0]
    sizes, moved = ((factor.double() @ directions).abs().mean(dim=0) for factor in (b, b - corrected))
    return bool((moved <= limit * sizes + 1e-5 * sizes.max()).all())
