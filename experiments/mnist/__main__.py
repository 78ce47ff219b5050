"""`python -m experiments.mnist` trains the CNN; `--help` lists the options."""

import sys

import tyro
from absl import logging

from .train import Config, main

if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # TFDS would advise a faster decoder than Pillow
    try:
        main(tyro.cli(Config, prog="python -m experiments.mnist"))
    except ValueError as error:
        sys.exit(f"error: {error}")
