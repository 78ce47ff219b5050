"""The figures. Each is drawn once; afterwards only its sources and ranges change."""

import functools
from collections.abc import Mapping

import numpy as np
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    ContourRenderer,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    Legend,
    LegendItem,
    LinearColorMapper,
    Range1d,
)
from bokeh.plotting import figure
from bokeh.plotting.contour import ContourData, contour_data

from experiments.common.objectives import FUNCTIONS
from experiments.common.palette import BLUE, RED, SIX

from .compute import OPTIMIZERS

TEXT = "#1a1a1a"
# jadam's curves are solid, optax's dashed.
STYLES = dict(
    zip(
        OPTIMIZERS,
        [(color, dash) for dash in ("solid", "dashed") for color in SIX],
        strict=True,
    )
)
_COORDINATES = {"x": BLUE, "y": RED}
_TOOLS = "pan,wheel_zoom,reset"
_BANDS = 14
_EDGES = list(range(0, _BANDS, 3))
# The lower the lighter, as in the pictures of experiments/trajectories.
_PALE = [f"#{255 - 6 * i:02x}{255 - 5 * i:02x}{255 - 4 * i:02x}" for i in range(_BANDS)]


@functools.cache
def contours(function: str) -> ContourData:
    """Bands of the function, in a plane twice as wide as the view.

    The levels are quantiles of the view's values, closer together near the minima.
    """
    f = FUNCTIONS[function]
    centre, size = np.mean(f.view, axis=1), np.ptp(f.view, axis=1)
    x, y = (c + s * np.linspace(-1, 1, 201) for c, s in zip(centre, size, strict=True))
    z = f.value(*np.meshgrid(x, y))
    levels = np.quantile(z[50:151, 50:151], np.linspace(0, 1, _BANDS) ** 2)
    return contour_data(x, y, z, [0.0, *levels[1:], 1.01 * z.max()])


def _plot(title: str, x_label: str, y_label: str, **options) -> figure:
    """An empty figure that fills its place."""
    made = figure(
        title=title,
        x_axis_label=x_label,
        y_axis_label=y_label,
        sizing_mode="stretch_both",
        toolbar_location="above",
        active_drag=None,  # a finger scrolls the page
        **options,
    )
    made.toolbar.logo = None
    made.title.update(text_font_size="13px", text_color=TEXT)
    for axis in made.axis:
        axis.update(
            axis_label_text_font_style="normal",
            axis_label_text_font_size="13px",
            axis_label_text_color=TEXT,
            major_label_text_font_size="12px",
            major_label_text_color=TEXT,
            minor_tick_line_color=None,
        )
    return made


def _look_at(span: Range1d, start: float, end: float) -> None:
    span.update(start=start, end=end, reset_start=start, reset_end=end)


def _add_legend(to: figure, lines: Mapping[str, GlyphRenderer], columns: int) -> list[LegendItem]:
    """Under the figure, where it hides nothing."""
    items = [LegendItem(label=name, renderers=[line]) for name, line in lines.items()]
    legend = Legend(
        items=items,
        ncols=columns,
        border_line_color=None,
        label_text_font_size="12px",
        label_text_color=TEXT,
        label_height=16,
        glyph_width=24,
        glyph_height=16,
        spacing=10,
        padding=0,
        margin=4,
        location="left",
    )
    to.add_layout(legend, "below")
    return items


def _draw_each(
    to: figure, sources: Mapping[str, ColumnDataSource], x: str, y: str
) -> list[LegendItem]:
    """A line for every optimizer."""
    lines = {}
    for name, source in sources.items():
        color, dash = STYLES[name]
        lines[name] = to.line(
            x, y, source=source, name=name, line_color=color, line_dash=dash, line_width=2
        )
    to.add_tools(
        HoverTool(
            renderers=list(lines.values()),
            line_policy="nearest",
            tooltips=[
                ("", "$name"),
                ("step", "@step"),
                ("x, y", "@x{0.0000}, @y{0.0000}"),
                ("loss", "@loss{0.00e+0}"),
            ],
        )
    )
    return _add_legend(to, lines, 3)


class Landscape:
    """The paths over contours: from a square to a dot each, with a star at each minimum."""

    def __init__(
        self,
        sources: Mapping[str, ColumnDataSource],
        start: ColumnDataSource,
        ends: ColumnDataSource,
    ) -> None:
        self.figure = _plot("Paths", "x", "y", tools=_TOOLS, x_range=Range1d(), y_range=Range1d())
        self.figure.grid.visible = False
        self.contours: ContourRenderer = self.figure.contour(
            z=np.eye(2),  # until show
            levels=np.arange(_BANDS + 1.0),
            fill_color=_PALE,
            line_color="#8d97a8",
            line_width=0.5,
        )
        # Bands of equal height; what they stand for is written at some of their edges.
        self._bar = ColorBar(
            color_mapper=LinearColorMapper(_PALE, low=0, high=_BANDS),
            ticker=FixedTicker(ticks=_EDGES),
            title="f(x, y)",
            width=10,
            padding=4,
            bar_line_color="#8d97a8",
            title_text_font_style="normal",
            title_text_color=TEXT,
            major_label_text_color=TEXT,
        )
        self.figure.add_layout(self._bar, "right")
        self._minima = ColumnDataSource({"x": [], "y": []})
        self.figure.scatter(
            "x", "y", source=self._minima, marker="star", size=13, color="#ffffff", line_color=TEXT
        )
        self.items = _draw_each(self.figure, sources, "x", "y")
        self.figure.scatter(
            "x",
            "y",
            source=start,
            marker="square",
            size=9,
            color="#ffffff",
            line_color=TEXT,
            line_width=1.5,
        )
        self.figure.scatter(
            "x", "y", source=ends, size=8, color="color", line_color="#ffffff", line_width=1
        )

    def show(self, function: str) -> None:
        """The landscape of another function."""
        f = FUNCTIONS[function]
        self.contours.set_data(contours(function))
        lower = contours(function).fill_data.lower_levels
        self._bar.major_label_overrides = {i: f"{lower[i]:.3g}" for i in _EDGES}
        self._minima.data = {"x": [x for x, _ in f.minima], "y": [y for _, y in f.minima]}
        for span, limits in zip((self.figure.x_range, self.figure.y_range), f.view, strict=True):
            _look_at(span, *limits)


class Losses:
    """The loss of each path against the step, down to LOWEST."""

    LOWEST = 1e-12
    """Under this nothing is drawn: a minimum is 0, which has no logarithm."""

    def __init__(self, sources: Mapping[str, ColumnDataSource]) -> None:
        self.figure = _plot(
            "Loss",
            "step",
            "f(x, y)",
            tools=_TOOLS,
            y_axis_type="log",
            x_range=Range1d(),
            y_range=Range1d(),
        )
        self.items = _draw_each(self.figure, sources, "step", "loss")

    def fit(self, steps: int, losses: np.ndarray) -> None:
        """Whole decades; a path that flies away leaves at the top."""
        low = max(losses.min(), self.LOWEST)
        high = max(10 * low, min(losses.max(), 1e3 * losses[0]))
        start, end = 10.0 ** np.floor(np.log10(low)), 10.0 ** np.ceil(np.log10(high))
        _look_at(self.figure.x_range, 0, steps)
        _look_at(self.figure.y_range, start, end)


# For each figure its title, its scale, and the dash and the label of its values.
_INNER = {
    "m": (
        "First moment m, m̂ = m/(1 - b1ᵗ)",
        "linear",
        {"m": ("dashed", "m"), "m_hat": ("solid", "m̂")},
    ),
    "v": (
        "Second moment v, v̂ = v/(1 - b2ᵗ)",
        "log",
        {"v": ("dashed", "v"), "v_hat": ("solid", "v̂")},
    ),
    "step": (
        "Effective step -α·m̂/(√v̂ + eps); dotted: ±α",
        "linear",
        {"step": ("solid", "step")},
    ),
    "rate": ("Rate of a coordinate α/(√v̂ + eps)", "log", {"rate": ("solid", "rate")}),
}


def inner_figures(source: ColumnDataSource) -> dict[str, figure]:
    """Adam's values against the step, for x and y: the columns m_x, m_y, m_hat_x and so on."""
    made = {}
    for key, (title, scale, values) in _INNER.items():
        plot = _plot(title, "step", "", tools="", y_axis_type=scale)
        if scale == "log":
            plot.yaxis.ticker.mantissas = [1, 2, 5]
        lines = {
            f"{label} of {coordinate}": plot.line(
                "step",
                f"{field}_{coordinate}",
                source=source,
                line_color=color,
                line_dash=dash,
                line_width=2,
            )
            for coordinate, color in _COORDINATES.items()
            for field, (dash, label) in values.items()
        }
        shown = [
            (f"{label} of x, y", f"@{field}_x{{0.000e+0}}, @{field}_y{{0.000e+0}}")
            for field, (_, label) in values.items()
        ]
        plot.add_tools(
            HoverTool(
                renderers=[next(iter(lines.values()))],
                mode="vline",
                tooltips=[("step", "@step"), *shown],
            )
        )
        plot.toolbar_location = None
        _add_legend(plot, lines, 4)
        made[key] = plot
    return made
