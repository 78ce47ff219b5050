"""Every measurement in turn: `python -m experiments.bench`."""

from experiments.bench import accuracy, speed, whole

accuracy.main()
speed.main()
whole.main()
