"""Every measurement in turn: `python -m experiments.bench`."""

import tyro

from experiments.bench import accuracy, speed, whole


def main() -> None:
    """Accuracy, speed and whole programs, each into its JSON: half an hour on 2 idle cores."""
    accuracy.main()
    speed.main()
    whole.main()


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.bench")
