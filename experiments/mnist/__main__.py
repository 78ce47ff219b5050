"""`python -m experiments.mnist` trains a model; `--help` lists the options."""

import shlex
import signal
import sys

from absl import logging

from .config import parse
from .interruption import InterruptedRunError, exit_by

if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # TFDS would advise a faster decoder than Pillow
    try:
        config = parse()
        from .train import main  # takes seconds, for which a wrong option need not wait

        main(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except InterruptedRunError as interrupted:
        options = [option for option in sys.argv[1:] if option != "--resume"]
        again = shlex.join(["python", "-m", "experiments.mnist", *options, "--resume"])
        print(f"{interrupted}; this goes on from there:\n{again}", file=sys.stderr, flush=True)
        exit_by(interrupted.number)
    except KeyboardInterrupt:  # before the first step or after the last, which is saved
        exit_by(signal.SIGINT)
