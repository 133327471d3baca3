"""A quality-bytes curve: what `qlora_pipe.frontier` finds and the report draws."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """One allocation.

    Attributes:
        bits_per_weight: of the block linears, scales and low-rank factors counted.
        bytes: of the packed linear maps.
        budget_bytes: the smallest byte budget of the whole model that affords it.
        loss: total loss, in the units of the error table.
    """

    bits_per_weight: float
    bytes: int
    budget_bytes: int
    loss: float


@dataclass(frozen=True)
class Row(Point):
    """A point with the exact bytes of the model's weight files; `chosen`: the allocation that the run took."""

    artifact_bytes: int
    chosen: bool


@dataclass(frozen=True)
class Curve:
    """`vertices`: every vertex, the smallest first, each the best of its size. `rows`: some of them, evenly spaced
    in bits per weight, and the allocation of the run if there is one."""

    run: Path
    budget: str
    vertices: tuple[Point, ...]
    rows: tuple[Row, ...]

    @property
    def chosen(self) -> Row | None:
        return next((row for row in self.rows if row.chosen), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "budget": self.budget,
            "rows": [asdict(row) for row in self.rows],
            "vertices": [asdict(point) for point in self.vertices],
        }
