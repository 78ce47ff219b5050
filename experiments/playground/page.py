"""The page: pickers and sliders on one side, sources of data on the other, one function between."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
from bokeh.events import Tap
from bokeh.models import ColumnDataSource, CustomJSTickFormatter, Span, TickFormatter
from panel.io.location import Location
from panel.io.resources import LOCAL_DIST

from experiments.common.objectives import FUNCTIONS

from .compute import MAX_STEPS, OPTIMIZERS, Descent, Inner, Setting, descend, inner
from .figures import STYLES, Landscape, Losses, inner_figures

TEMPLATE = (Path(__file__).parent / "page.html").read_text()
PICKED = ["Adam", "AMSGrad", "NAdam", "RMSProp"]
# Positions of sliders, and what is picked, that differ from the start.
PRESETS: dict[str, dict[str, Any]] = {
    "As at the start": {},
    "b2 = 0.99999: what the bias corrections are for": {
        "b2": 5,
        "optimizers": ["Adam", "RMSProp"],
    },
    "Ill-conditioned, b1 = 0.5: no overshooting": {"function": "ellipse", "b1": 0.3},
    "Sphere, b1 = 0.99, b2 = 0.9: steps longer than α": {"function": "sphere", "b1": 2, "b2": 1},
    "eps = 1: momentum where gradients are small": {"eps": 0, "optimizers": ["Adam", "Momentum"]},
    "Rosenbrock: SGD diverges, Adam does not": {
        "function": "rosenbrock",
        "optimizers": ["Adam", "SGD"],
    },
    "Noise: who comes to rest": {"noise": 5, "steps": 1000, "optimizers": ["Adam", "SGD"]},
}
# jadam's in one column, optax's in the other.
TWO_COLUMNS = """
.bk-input-group { display: grid; grid-auto-flow: column; grid-template-rows: repeat(6, 26px); }
.bk-input-group label { font-size: 14px; align-items: center; }
"""

# What a slider's position stands for, where it is not the value itself.
FROM_POSITION = {
    "learning_rate": lambda exponent: 10.0**exponent,
    "b1": lambda exponent: 1 - 10.0**-exponent,
    "b2": lambda exponent: 1 - 10.0**-exponent,
    "eps": lambda exponent: 10.0**exponent,
    "steps": int,
    "seed": int,
}


def power() -> TickFormatter:
    return CustomJSTickFormatter(code="return String(Number((10 ** tick).toPrecision(3)))")


def decay_rate() -> TickFormatter:
    """Two digits more than there are nines."""
    return CustomJSTickFormatter(
        code="return String(Number((1 - 10 ** -tick).toFixed(Math.ceil(tick) + 1)))"
    )


def slider(
    label: str, start: float, end: float, value: float, step: float, shown: str | TickFormatter
) -> pn.widgets.FloatSlider:
    return pn.widgets.FloatSlider(
        label=label,
        start=start,
        end=end,
        value=value,
        step=step,
        format=shown,
        tooltips=False,
        sizing_mode="stretch_width",
    )


class Page:
    """What one visitor sees.

    Attributes:
        controls: the widgets, by the names of `Setting`'s fields.
        optimizers: the picker of optimizers.
        paths: the source of each optimizer's path.
        presets: the picker of things to try.
        start: the source of the first point.
        ends: the source of the last points.
        inner: the source of Adam's values.
        landscape: the figure of the paths.
        losses: the figure of the losses.
        formula: the function, as text.
        status: how long it took, and which paths ended early.
    """

    def __init__(self) -> None:
        default = Setting()
        self.controls = {
            "function": pn.widgets.Select(
                label="Function",
                options={f.title.capitalize(): name for name, f in FUNCTIONS.items()},
                value=default.function,
                sizing_mode="stretch_width",
            ),
            "learning_rate": slider("Learning rate α", -4, 1, -1, 0.05, power()),
            "b1": slider("b1", 0, 3, 1, 0.05, decay_rate()),
            "b2": slider("b2", 0, 5, 3, 0.05, decay_rate()),
            "eps": slider("eps", -12, 0, -8, 0.25, power()),
            "x": slider("Start x", -5, 5, default.x, 0.01, "0.00"),
            "y": slider("Start y", -5, 5, default.y, 0.01, "0.00"),
            "steps": slider("Steps", 1, MAX_STEPS, default.steps, 1, "0"),
            "noise": slider("Noise of the gradient (sd)", 0, 10, 0, 0.1, "0.0"),
            "seed": slider("Seed of the noise", 0, 99, 0, 1, "0"),
        }
        self.optimizers = pn.widgets.CheckBoxGroup(
            options=list(OPTIMIZERS),
            value=PICKED,
            stylesheets=[TWO_COLUMNS],
            sizing_mode="stretch_width",
        )
        self.presets = pn.widgets.Select(
            label="Things to try", options=list(PRESETS), sizing_mode="stretch_width"
        )
        self.formula = pn.pane.HTML(sizing_mode="stretch_width")
        self.status = pn.pane.HTML(margin=0, sizing_mode="stretch_width")

        self.paths = {
            name: ColumnDataSource(
                {key: [] for key in ("step", "x", "y", "loss")}, name=f"path of {name}"
            )
            for name in OPTIMIZERS
        }
        self.start = ColumnDataSource({"x": [], "y": []})
        self.ends = ColumnDataSource({"x": [], "y": [], "color": []})
        self.inner = ColumnDataSource(name="inner values")
        self.landscape = Landscape(self.paths, self.start, self.ends)
        self.losses = Losses(self.paths)
        self._inner = inner_figures(self.inner)
        self._bounds = [
            Span(dimension="width", line_color="#555555", line_dash="dotted") for _ in "+-"
        ]
        for bound in self._bounds:
            self._inner["step"].add_layout(bound)

        self.landscape.figure.on_event(Tap, self.start_at)
        self._show_function()
        self.draw()
        self._first = {name: widget.value for name, widget in self.controls.items()}
        self.presets.param.watch(self._show_preset, "value")
        self.controls["function"].param.watch(self._show_function, "value")
        for widget in (*self.controls.values(), self.optimizers):
            widget.param.watch(self._changed, "value")

    def setting(self) -> Setting:
        """The values that the controls stand for."""
        return Setting(
            **{
                name: FROM_POSITION.get(name, lambda value: value)(widget.value)
                for name, widget in self.controls.items()
            }
        )

    def _changed(self, *_: object) -> None:
        """Draws, and sends all to the browser in one message, so that it paints once."""
        with pn.io.hold():
            self.draw()

    def draw(self) -> None:
        """Compute all that is picked and put it into the sources."""
        began = time.perf_counter()
        setting = self.setting()
        descents = {name: descend(name, setting) for name in self.optimizers.value}
        adam = descents["Adam"] if "Adam" in descents else descend("Adam", setting)
        for name, source in self.paths.items():
            source.data = _columns(descents[name]) if name in descents else _NO_PATH
        for items in (self.landscape.items, self.losses.items):
            for item, name in zip(items, OPTIMIZERS, strict=True):
                item.visible = name in descents
        self.start.data = {"x": [setting.x], "y": [setting.y]}
        ends = np.array([d.points[-1] for d in descents.values()]).reshape(-1, 2)
        self.ends.data = {
            "x": ends[:, 0],
            "y": ends[:, 1],
            "color": [STYLES[name][0] for name in descents],
        }
        self.inner.data = _inner_columns(inner(adam, setting))
        for bound, sign in zip(self._bounds, (1, -1), strict=True):
            bound.location = sign * setting.learning_rate
        shown = list(descents.values()) or [adam]
        self.losses.fit(setting.steps, np.concatenate([d.losses for d in shown]))
        milliseconds = 1000 * (time.perf_counter() - began)
        self.status.object = f"Computed in {milliseconds:.0f} ms. {_note(descents)}"

    def _show_function(self, *_: object) -> None:
        """Its landscape, and the start that belongs to it."""
        name = self.controls["function"].value
        self.landscape.show(name)
        function = FUNCTIONS[name]
        self.formula.object = f"f(x, y) = {function.formula}"
        for axis, (start, end), value in zip("xy", function.view, function.start, strict=True):
            self.controls[axis].param.update(start=start, end=end, value=value)

    def _show_preset(self, *_: object) -> None:
        """All as at the start, but for what is to be tried."""
        chosen = self._first | PRESETS[self.presets.value]
        self.optimizers.value = chosen.pop("optimizers", PICKED)
        function = chosen.pop("function")
        self.controls["function"].value = function
        start = dict(zip("xy", FUNCTIONS[function].start, strict=True))
        for name, value in (chosen | start).items():
            self.controls[name].value = value

    def keep_in(self, location: Location) -> None:
        """What is set goes into the page's address, and comes from it."""
        for name, widget in self.controls.items():
            location.sync(widget, {"value": name})
        picked = location.query_params.get("optimizers")
        if isinstance(picked, str):
            self.optimizers.value = [name for name in OPTIMIZERS if name in picked.split(",")]
        self.optimizers.param.watch(
            lambda event: location.update_query(optimizers=",".join(event.new)), "value"
        )

    def start_at(self, event: Tap) -> None:
        """Start where the contours were clicked."""
        for axis, value in (("x", event.x), ("y", event.y)):
            widget = self.controls[axis]
            widget.value = round(min(max(value, widget.start), widget.end), 2)

    def template(self) -> pn.Template:
        """All of it in its place."""
        controls = pn.Column(
            self.presets,
            self.controls["function"],
            self.formula,
            self.optimizers,
            *list(self.controls.values())[1:],
            sizing_mode="stretch_width",
        )
        figures = {"paths": self.landscape.figure, "losses": self.losses.figure, **self._inner}
        items = {
            name: pn.pane.Bokeh(figure, sizing_mode="stretch_both")
            for name, figure in figures.items()
        }
        items |= {"controls": controls, "status": self.status}
        made = pn.Template(TEMPLATE, items=items)
        made.location = True  # the page's address, with what is set
        return made


def new_page() -> pn.Template:
    """The page of a new session."""
    # Panel would begin with its CDN and mend that when it sends the page, hence not in a session
    # whose page was sent long ago.
    pn.state.curdoc.template_variables["dist_url"] = LOCAL_DIST
    page = Page()
    if pn.state.location is not None:
        page.keep_in(pn.state.location)
    return page.template()


def _note(descents: Mapping[str, Descent]) -> str:
    """What a figure cannot show."""
    if not descents:
        return "No optimizer is picked."
    lost = [f"{name} after step {len(d.updates)}" for name, d in descents.items() if d.diverged]
    return f"Diverged, so the path ends: {', '.join(lost)}." if lost else ""


_NO_PATH = {"step": [], "x": [], "y": [], "loss": []}


def _columns(descent: Descent) -> dict[str, np.ndarray]:
    x, y = descent.points.T
    return {"step": np.arange(len(x)), "x": x, "y": y, "loss": descent.losses}


def _inner_columns(values: Inner) -> dict[str, np.ndarray]:
    """A column for each value and coordinate; 0, which has no logarithm, is left out of v."""
    columns = {"step": np.arange(1, len(values.m) + 1)}
    for field, array in values._asdict().items():
        for coordinate, column in zip("xy", array.T, strict=True):
            if field in ("v", "v_hat"):
                column = np.where(column > 0, column, np.nan)
            columns[f"{field}_{coordinate}"] = column
    return columns
