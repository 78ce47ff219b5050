"""`python -m experiments.lowmem mnist|lm|report|memory`; `--help` lists the options."""

import sys

import tyro
from absl import logging

from . import lm, mnist, report

if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # TFDS would advise a faster decoder than Pillow
    config = tyro.extras.subcommand_cli_from_dict(
        {"mnist": mnist.Mnist, "lm": lm.Lm, "report": report.Report, "memory": report.Memory},
        prog="python -m experiments.lowmem",
    )
    main = {
        mnist.Mnist: mnist.main,
        lm.Lm: lm.main,
        report.Report: report.main,
        report.Memory: report.main_of_memory,
    }[type(config)]
    try:
        main(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
