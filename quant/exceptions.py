"""Typed errors of the quantisation numerics."""


class QuantError(ValueError):
    """A request the quantisation numerics cannot honour; base of every error raised by this package."""


class ShapeError(QuantError):
    """A tensor's shape does not fit the format or the other tensors."""


class NonFiniteError(QuantError):
    """NaN or infinity where a finite number is required."""
