"""`python -m experiments.trajectories` draws everything; `--help` lists the options."""

import sys

import tyro

from .run import Config, main

if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m experiments.trajectories"))
    except ValueError as error:
        sys.exit(f"error: {error}")
