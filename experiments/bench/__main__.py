"""Every measurement in turn: `python -m experiments.bench`."""

from experiments.bench import accuracy, speed

accuracy.main()
speed.main()
