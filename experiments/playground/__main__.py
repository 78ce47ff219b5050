"""`python -m experiments.playground`; `--help` lists the options."""

import contextlib
import sys
from dataclasses import dataclass

import jax
import panel as pn
import tyro
from rich.progress import track

from .compute import OPTIMIZERS, warm_up
from .page import new_page


@dataclass(frozen=True)
class Playground:
    """A page of sliders: paths, loss curves and Adam's inner values, computed by jadam at once."""

    port: int = 5006
    """Where to listen, on this machine alone; 0 takes a free port."""
    show: bool = True
    """Open the page in a browser."""


def main(config: Playground) -> None:
    if not 0 <= config.port <= 65535:
        sys.exit(f"error: --port: expected a number from 0 to 65535, got {config.port}")
    try:
        server = pn.serve(
            new_page,
            port=config.port,
            address="localhost",
            start=False,
            show=False,
            verbose=False,
        )
    except OSError as error:
        sys.exit(
            f"error: cannot listen on port {config.port}: {error.strerror}; choose another with "
            "--port, or 0 for any free one"
        )
    jax.config.update("jax_platforms", "cpu")  # two numbers at a time are no work for a GPU
    for _ in track(warm_up(), "Compiling", total=len(OPTIMIZERS)):
        pass
    url = f"http://localhost:{server.port}"
    print(f"The playground is at {url} (Ctrl-C ends it)", flush=True)
    if config.show:
        server.io_loop.add_callback(server.show, "/")
    server.start()
    with contextlib.suppress(KeyboardInterrupt):
        server.io_loop.start()


if __name__ == "__main__":
    main(tyro.cli(Playground, prog="python -m experiments.playground"))
