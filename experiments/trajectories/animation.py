"""The race: every optimizer on every function at its best learning rate, as a GIF that loops."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from rich.progress import track

from experiments.common.report import write_file

from .choose import Choice
from .descend import JADAM
from .pictures import STYLES, landscape, title, visible
from .problem import Problem

FRAME, LAST_FRAME = 120, 2500  # milliseconds
TAIL = 12  # frames


def frame_steps(steps: int, frames: int = 100) -> Int[np.ndarray, " frames"]:
    """The step that each frame shows: at first every step, later ever fewer, at last the last."""
    return np.unique(np.round(np.geomspace(1, steps + 1, frames)).astype(int)) - 1


def animate(
    path: Path, problems: Sequence[Problem], choices: Mapping[str, Sequence[Choice]], steps: int
) -> None:
    """Writes the GIF, a frame for each of `frame_steps(steps)`, whole or not at all."""
    columns = min(len(problems), 3)
    rows = len(problems) // columns
    figure = Figure((8.0, 2.4 * rows + 0.9 if columns > 1 else 5.0), layout="constrained", dpi=100)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    of_problems = zip(*choices.values(), strict=True)
    runners: list[tuple[np.ndarray, Line2D, Line2D]] = []
    for axes, problem, of_problem in zip(panels, problems, of_problems, strict=True):
        landscape(axes, problem)
        axes.set(xticks=[], yticks=[])
        title(axes, problem)
        for name, choice in zip(choices, of_problem, strict=True):
            (tail,) = axes.plot([], [], linewidth=1.3, **STYLES[name])
            marker, color = "o" if name in JADAM else "s", STYLES[name]["color"]
            (head,) = axes.plot([], [], marker, color=color, markersize=5, label=name)
            head.set(markeredgecolor="white", markeredgewidth=0.6)
            runners.append((visible(choice.runs, problem), tail, head))
    heads = axes.get_legend_handles_labels()
    figure.legend(*heads, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    clock = figure.suptitle(f"step {steps}")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for each frame

    shown = frame_steps(steps)
    frames = []
    for i, step in enumerate(track(shown, "animation", transient=True)):
        begin = shown[max(0, i - TAIL)]
        clock.set_text(f"step {step}")
        for points, tail, head in runners:
            tail.set_data(*points[begin : step + 1].T)
            head.set_data(*points[: step + 1][-1:].T)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))

    # One palette for all frames, so that each holds only what changed. In the middle frame all
    # colours are there.
    palette = frames[len(frames) // 4].quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    film = io.BytesIO()
    frames[0].save(
        film,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[FRAME] * (len(frames) - 1) + [LAST_FRAME],
        loop=0,
    )
    write_file(path, film.getvalue())
