"""How a picture is written: PNG and SVG, the same bytes for the same numbers."""

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.common.report import write_file

# Without random names inside an SVG, and with its text as text.
STYLE = {"svg.hashsalt": "jadam", "svg.fonttype": "none"}


def write(figure: Figure, stem: Path, dpi: int = 120) -> None:
    """Writes stem.png and stem.svg, each whole or not at all."""
    for kind in ("png", "svg"):
        drawn = io.BytesIO()
        with mpl.rc_context(STYLE):
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(drawn, format=kind, dpi=dpi, metadata=metadata)
        write_file(stem.with_name(f"{stem.name}.{kind}"), drawn.getvalue())
