"""Errors of the prune package: one small tree under ``PruneError``."""


class PruneError(ValueError):
    """A shape, role, score or index that pruning cannot work with."""


class IndexMapError(PruneError):
    """A kept-index record that is malformed, out of bounds, unsorted or of an unknown version."""


class RatioError(PruneError):
    """A pruning ratio that is outside [0, 1), or that would leave nothing, or that nothing may obey."""
