"""The frontier of a run as a picture of its own, in the report's style and light colours."""

import re
import warnings
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_pipe.curve import Curve
from qlora_pipe.report.charts import standalone_style


def draw_frontier(curve: Curve, path: Path) -> None:
    """Loss against bits per weight, the whole model's size along the top; the ending of `path` is the format.

    Raises OSError where it cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = _light_colours()
    first = curve.vertices[0]
    scale, rest = first.bytes / first.bits_per_weight / 1e6, (first.budget_bytes - first.bytes) / 1e6
    with matplotlib.rc_context(standalone_style(colours)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=160)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        points = [(point.bits_per_weight, point.loss) for point in curve.vertices]
        axes.plot(*zip(*points, strict=True), color=colours["strong"], linewidth=1.8)
        if curve.chosen is not None:
            place = (curve.chosen.bits_per_weight, curve.chosen.loss)
            axes.plot(*place, marker="o", markersize=8, color=colours["ink"])
            axes.annotate(f"this run, {curve.budget}", place, (8, 8), textcoords="offset points")
        least, most = curve.vertices[-1].loss, curve.vertices[0].loss
        if least > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if most < 10 * least else "")
        axes.set(xlabel="bits per block weight", ylabel="loss of the allocation")
        there, back = partial(_line, scale, rest), partial(_line, 1 / scale, -rest / scale)
        axes.secondary_xaxis("top", functions=(there, back)).set_xlabel("whole model (MB)")
        axes.grid(axis="both")
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else {})


def _line(slope: float, start: float, values: Any) -> Any:
    return slope * values + start


def _light_colours() -> dict[str, str]:
    """The page's colours by name, as its style sheet has them first."""
    text = resources.files("qlora_pipe.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for name, colour in re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text):
        found.setdefault(name, colour)
    return found
