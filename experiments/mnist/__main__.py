"""`python -m experiments.mnist` trains a model; `--help` lists the options."""

import sys

from absl import logging

from .config import parse

if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # TFDS would advise a faster decoder than Pillow
    try:
        config = parse()
        from .train import main  # takes seconds, for which a wrong option need not wait

        main(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
