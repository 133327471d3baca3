"""Charts as inline SVG that follows the page: its font, and its colours in light and in dark.

Drawn with matplotlib's object interface, so that no global figure is left behind. Text stays text. Colours are
placeholders while matplotlib draws and become CSS variables of the page afterwards.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prune.groups import ROLES
from qlora_pipe.architectures import linear_name
from qlora_pipe.report.facts import PRODUCTS, Kept, ModelRow, StageRow, configuration_name
from qlora_pipe.report.table import figure as digits
from qlora_pipe.units import format_bytes
from quant.storage import Choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTHS = (2, 3, 4, 8)
_COLOURS = ["ink", "muted", "grid", "pale", "strong"]
_COLOURS += [f"{what}-{bits}" for what in ("bits", "on-bits") for bits in _WIDTHS]
_HEX = {name: f"#0b5e{number:02x}" for number, name in enumerate(_COLOURS)}
"""What stands for each CSS variable while matplotlib draws."""

_FONT = r"(?:'[^']*'|[\w-]+)"
_WIDTH = 10.4
_LAYERS_IN_A_BAND = 40
_POINTS_TO_PIXELS = 4 / 3
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qlora_pipe",
    "text.parse_math": False,
    "font.size": 8.5,
    "text.color": _HEX["ink"],
    "axes.edgecolor": _HEX["grid"],
    "axes.labelcolor": _HEX["muted"],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": _HEX["ink"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": _HEX["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": _HEX["grid"],
    "ytick.color": _HEX["grid"],
    "xtick.labelcolor": _HEX["muted"],
    "ytick.labelcolor": _HEX["ink"],
}


def perplexity_chart(models: Sequence[ModelRow], datasets: Sequence[str]) -> str:
    """Horizontal bars, a panel per data set; logarithmic from perplexity 1 where the largest would hide the rest."""

    def draw(figure: "Figure") -> None:
        columns = min(len(datasets), 3)
        panels = list(figure.subplots(-(-len(datasets) // columns), columns, sharey=True, squeeze=False).flat)
        for panel, dataset in zip(panels, datasets, strict=False):
            _perplexity_panel(panel, models, dataset)
        for panel in panels[len(datasets) :]:
            panel.set_visible(False)

    rows = -(-len(datasets) // 3)
    return _svg("perplexity", "Perplexity of every model", draw, _WIDTH, rows * (0.62 + 0.27 * len(models)))


def _perplexity_panel(panel: "Axes", models: Sequence[ModelRow], dataset: str) -> None:
    values = [row.perplexity.get(dataset, 1.0) for row in models]
    colours = [_HEX["strong" if row.name in PRODUCTS else "muted" if row.name == "base" else "pale"] for row in models]
    panel.barh(range(len(models)), values, height=0.62, color=colours)
    panel.set_yticks(range(len(models)), [row.name for row in models])
    panel.set_ylim(len(models) - 0.5, -0.5)
    panel.set_title(dataset)
    if max(values) > 20 * min(values):
        # A bar's length is then the loss in nats: perplexity 1 is its zero.
        panel.set_xscale("log")
        panel.set_xlim(1, max(values) ** 1.25)
        panel.xaxis.set_major_formatter(_power_of_ten)
        panel.xaxis.minorticks_off()
    else:
        panel.set_xlim(0, 1.2 * max(values))
    panel.grid(axis="x")
    panel.tick_params(length=0)
    panel.spines[["bottom", "left"]].set_visible(False)
    for position, row in enumerate(models):
        told = digits(row.perplexity.get(dataset))
        panel.annotate(told, (values[position], position), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _power_of_ten(value: float, _: float) -> str:
    """`100`, `10k`, `1M`; beyond that as a computer writes it."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if size <= value < 1e9:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def bits_chart(choices: Mapping[str, Mapping[str, Any]]) -> str:
    """Code bits of every linear map: a column per layer, a row per role, all figures of a cell in its tooltip.

    A deep model takes several bands.
    """
    layers = len(choices) // len(ROLES)
    bands = -(-layers // _LAYERS_IN_A_BAND)
    columns = -(-layers // bands)
    cell = min(0.62, (_WIDTH - 0.7) / columns)
    tips: dict[str, str] = {}

    def draw(figure: "Figure") -> None:
        for band, axes in enumerate(figure.subplots(bands, 1, squeeze=False).flat):
            start = band * columns
            for layer in range(start, min(start + columns, layers)):
                tips.update(_bits_column(axes, layer, choices))
            axes.set(xlim=(start, start + columns), ylim=(len(ROLES), 0))
            axes.set_yticks([row + 0.5 for row in range(len(ROLES))], ROLES)
            shown = range(start, min(start + columns, layers))
            axes.set_xticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown], fontsize=7.5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        axes.set_xlabel("layer")

    height = bands * (0.3 + 0.3 * len(ROLES)) + 0.25
    return _svg("bits", "Code bits by layer and role", draw, 0.7 + cell * columns, height, tips)


def _bits_column(axes: "Axes", layer: int, choices: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Draw the cells of one layer; their tooltips by element id."""
    from matplotlib.patches import Rectangle

    tips = {}
    for row, role in enumerate(ROLES):
        name = linear_name(layer, role)
        choice = Choice.from_json(choices[name])
        mark = f"cell-{layer}-{role}"
        tips[mark] = f"{name}: {configuration_name(choice)}, {format_bytes(choices[name]['bytes'])}"
        fill, ink = _HEX[f"bits-{choice.bits}"], _HEX[f"on-bits-{choice.bits}"]
        axes.add_patch(Rectangle((layer + 0.03, row + 0.03), 0.94, 0.94, facecolor=fill, linewidth=0, gid=mark))
        axes.text(layer + 0.5, row + 0.5, str(choice.bits), ha="center", va="center_baseline", color=ink)
    return tips


def kept_chart(kept: Sequence[Kept]) -> str:
    """Groups kept per layer, before a pale bar of what there was."""

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(2, 1, sharex=True)
        for panel, name, part, whole in (
            (panels[0], "KV groups", [row.kv_heads for row in kept], [row.all_kv_heads for row in kept]),
            (panels[1], "FFN channels", [row.ffn for row in kept], [row.all_ffn for row in kept]),
        ):
            panel.bar(range(len(kept)), whole, width=0.8, color=_HEX["grid"])
            panel.bar(range(len(kept)), part, width=0.8, color=_HEX["strong"])
            panel.set_title(f"{name} kept")
            panel.tick_params(length=0)
            panel.spines["left"].set_visible(False)
        panels[1].set_xlabel("layer")
        panels[1].set_xticks(range(0, len(kept), 1 if len(kept) <= 40 else 5))

    return _svg("kept", "Groups kept by layer", draw, _WIDTH, 3.2)


def loss_chart(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Training loss by optimiser step; the strong line is a running mean."""

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, len(histories), squeeze=False).flat
        for panel, (name, rows) in zip(panels, histories.items(), strict=True):
            steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
            keep = 1 - 1 / min(10, max(1, len(losses) // 5))
            smooth = list(accumulate(losses, lambda mean, loss, keep=keep: keep * mean + (1 - keep) * loss))  # type: ignore[misc]
            panel.plot(steps, losses, color=_HEX["pale"], linewidth=1)
            panel.plot(steps, smooth, color=_HEX["strong"], linewidth=1.8, marker="o" if len(rows) == 1 else None)
            panel.set_title(name)
            panel.set(xlabel="optimiser step", ylabel="loss (nats per token)")
            panel.xaxis.get_major_locator().set_params(integer=True)
            _open_grid(panel)

    return _svg("loss", "Training loss", draw, _WIDTH, 2.7)


def scale_chart(loss_by_scale: Mapping[str, float], chosen: float) -> str:
    """Held-out loss of the full model by adapter scale, the chosen one marked."""
    points = sorted((float(scale), loss) for scale, loss in loss_by_scale.items())

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color=_HEX["pale"], linewidth=1.8, marker="o", markersize=5)
        for scale, loss in points:
            if scale == chosen:
                axes.plot(scale, loss, marker="o", markersize=9, color=_HEX["strong"])
            axes.annotate(f"{loss:.4f}", (scale, loss), (0, 9), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks([scale for scale, _ in points], [f"{scale:g}" for scale, _ in points])
        axes.set(xlabel="scale of the recovered adapter", ylabel="held-out loss")
        axes.margins(x=0.08, y=0.25)
        _open_grid(axes)

    return _svg("scales", "Held-out loss by adapter scale", draw, _WIDTH, 2.6)


def memory_chart(stages: Sequence[StageRow]) -> str:
    """Planned and measured host peak of every stage that was made, with its seconds."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for side, colour, label, values in (
            (-0.2, "pale", "planned", [row.planned or 0 for row in stages]),
            (0.2, "strong", "measured", [row.measured or 0 for row in stages]),
        ):
            places = [position + side for position in range(len(stages))]
            axes.barh(places, [value / 1e9 for value in values], height=0.36, color=_HEX[colour], label=label)
            for place, value in zip(places, values, strict=True):
                if value:
                    axes.annotate(
                        format_bytes(value),
                        (value / 1e9, place),
                        (4, 0),
                        textcoords="offset points",
                        va="center_baseline",
                        fontsize=7.5,
                        color=_HEX["muted"],
                    )
        names = [f"{row.name} · {_duration(row.seconds)}" for row in stages]
        axes.set_yticks(range(len(stages)), names)
        axes.set_xlim(0, 1.12 * max(max(row.planned or 0, row.measured or 0) for row in stages) / 1e9 or 1)
        axes.invert_yaxis()
        axes.set_xlabel("peak host memory (GB)")
        axes.legend(loc="lower right", frameon=False, bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines[["bottom", "left"]].set_visible(False)

    return _svg("memory", "Peak host memory by stage", draw, _WIDTH, 0.8 + 0.42 * len(stages))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _open_grid(axes: "Axes") -> None:
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def standalone_style(colours: Mapping[str, str]) -> Any:
    """The charts' matplotlib style for a picture of its own, in the page's `colours` by name, letters as drawn."""
    names = {placeholder: name for name, placeholder in _HEX.items()}
    style = {key: colours[names[value]] if value in names else value for key, value in _STYLE.items()}
    return style | {"figure.facecolor": colours["card"], "svg.fonttype": "path"}


def _svg(
    name: str,
    title: str,
    draw: Callable[["Figure"], None],
    width: float,
    height: float,
    tips: Mapping[str, str] | None = None,
) -> str:
    """Draw on a figure of `width` x `height` inches and return it as markup; `tips` are tooltips by element id."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The reader's browser draws the text; letters that matplotlib's own font lacks are none of its business.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(stream.getvalue(), name, title, (width, height), tips or {})


def _inline(svg: str, name: str, title: str, inches: tuple[float, float], tips: Mapping[str, str]) -> str:
    """Turn a stand-alone SVG document into a part of the page, with ids that are its own."""
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    for mark, tip in tips.items():
        body = body.replace(f'<g id="{mark}">', f'<g id="{mark}"><title>{escape(tip)}</title>', 1)
    body = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{name}-", body)
    body = re.sub(rf"(font-family: |font: [\w. ]*px ){_FONT}(, {_FONT})*", r"\1var(--font)", body)
    body = _coloured(body, _HEX.items())
    pixels = round(inches[0] * 72 * _POINTS_TO_PIXELS)
    return (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{escape(title)}" '
        f'style="width:{pixels}px">{body}'
    )


def _coloured(body: str, colours: Iterable[tuple[str, str]]) -> str:
    for name, placeholder in colours:
        body = body.replace(placeholder, f"var(--{name})")
    return body
