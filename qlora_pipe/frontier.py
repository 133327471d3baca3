"""Quality against bytes for every budget, from the error table, ties and rules of a run. Touches no weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qlora_pipe import layouts
from qlora_pipe.allocation import offered, pose, read_allocation
from qlora_pipe.architectures import Architecture
from qlora_pipe.artifacts.headers import read_folder
from qlora_pipe.artifacts.layout import folder_files
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.curve import Curve, Point, Row
from qlora_pipe.errors import ArtifactError, ConfigError
from qlora_pipe.known import fixed_bytes
from qlora_pipe.report.facts import read_json
from qlora_pipe.report.table import render
from qlora_pipe.rules import narrow
from qlora_pipe.sources import BASE_LINK, ModelSource, architecture_of
from qlora_pipe.units import format_bytes
from quant.storage import Choice
from solver import SolverError, frontier

ROWS = 15
PICTURES = (".png", ".svg")


def show_frontier(run: Path, table: Path | None = None, plot: Path | None = None) -> str:
    """The curve as text; all of it as JSON into `table` and as a picture into `plot`, where these are given.

    Raises ArtifactError if the run has no error table yet or is damaged, SourceError if its model is gone,
    ConfigError if a file cannot be written.
    """
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {plot}: expected a file name that ends in {' or '.join(PICTURES)}")
    curve = read_curve(run)
    try:
        if table is not None:
            table.write_text(json.dumps(curve.to_json(), indent=2, allow_nan=False) + "\n")
        if plot is not None:
            from qlora_pipe.report.frontier_chart import draw_frontier

            draw_frontier(curve, plot)
    except OSError as error:
        raise ConfigError(f"{error.filename}: expected a path that can be written, found {error.strerror}") from error
    return render_curve(curve)


def read_curve(run: Path) -> Curve:
    """The curve of a run, from JSON and tensor headers; raises as `show_frontier`."""
    table = read_json(run / "score" / "table.json")
    if not table:
        raise ArtifactError(
            f"{run}: expected a run folder with an error table, found none; `qlora-pipe score CONFIG` makes it"
        )
    try:
        return _Reader(run, table).curve()
    except (SolverError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{run}: expected a whole error table and allocation, found {error!r}; run the chain again"
        ) from error


class _Reader:
    """A run's table, configuration and headers."""

    def __init__(self, run: Path, table: Mapping[str, Any]) -> None:
        self.run, self.table = run, table
        self.config: Config = load(run / "config.yaml")
        measured = {"seed": self.config.seed} | self.config.decompose.measured()
        if read_manifest(run / "score").settings != measured:
            raise ArtifactError(
                f"{run}: the error table was measured with other settings than config.yaml has; run score again"
            )
        base = run / BASE_LINK
        self.architecture: Architecture = architecture_of(ModelSource("folder", self.config.model, base))
        self.dtypes = {name: place.spec.dtype for name, place in read_folder(base).items()}
        self.fixed = fixed_bytes(self.architecture, self.dtypes, self.config)

    def curve(self) -> Curve:
        settings = self.config.decompose
        narrowed = narrow(offered(self.table), settings.rules, settings.ties)
        found = frontier(pose(self.table, narrowed, 0))
        vertices = [self._point(*pair) for pair in zip(found.cost.tolist(), found.loss.tolist(), strict=True)]
        wanted = np.linspace(found.cost[0], found.cost[-1], ROWS)
        named = {name: {choice.name: choice for choice in left} for name, left in narrowed.choices.items()}
        rows = []
        for vertex in np.unique(np.searchsorted(found.cost, wanted, side="right") - 1).tolist():
            allocation = {name: named[name][choice] for name, choice in found.selection(vertex).items()}
            rows.append(self._row(vertices[vertex], allocation, chosen=False))
        chosen = self._chosen()
        rows += [chosen] if chosen else []
        rows.sort(key=lambda row: (row.bytes, row.chosen))
        return Curve(self.run, settings.budget, tuple(vertices), tuple(rows))

    def _chosen(self) -> Row | None:
        """The allocation of the run, unless there is none or it was made from another table."""
        if not (self.run / "allocate").exists():
            return None
        if read_manifest(self.run / "allocate").inputs["score"] != read_manifest(self.run / "score").identity:
            return None
        body = read_json(self.run / "allocate" / "allocation.json")
        return self._row(self._point(body["bytes"], body["loss"]), read_allocation(body), chosen=True)

    def _point(self, cost: int, loss: float) -> Point:
        return Point(8 * cost / self.architecture.linear_weights(), cost, cost + self.fixed, loss)

    def _row(self, point: Point, allocation: Mapping[str, Choice], *, chosen: bool) -> Row:
        embeddings = self.config.decompose.embeddings
        tensors = layouts.decomposed(self.architecture, self.dtypes, allocation, embeddings)
        return Row(**asdict(point), artifact_bytes=sum(folder_files(tensors).values()), chosen=chosen)


def render_curve(curve: Curve) -> str:
    """The rows as a table, the allocation of the run marked."""
    chosen = curve.chosen
    head = ["bits per weight", "linear maps", "whole model", "loss"]
    rows = []
    for row in curve.rows:
        cells = [f"{row.bits_per_weight:.3f}", format_bytes(row.bytes), format_bytes(row.artifact_bytes)]
        cells.append(f"{row.loss:.5g}")
        if chosen is not None:
            ratio = f"{row.loss / chosen.loss:.3f}" if chosen.loss else "-"
            cells += [ratio, f"<- this run, {curve.budget}" if row.chosen else ""]
        rows.append(cells)
    if chosen is not None:
        head += ["loss / this run's", ""]
    low, high = curve.vertices[0], curve.vertices[-1]
    return (
        f"run {curve.run}: {len(curve.vertices)} vertices, {low.bits_per_weight:.3f} to {high.bits_per_weight:.3f} "
        f"bits per weight; each row is the best of its size\n\n{render(head, rows, text_columns=0)}"
    )
