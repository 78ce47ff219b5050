"""What XLA makes of a step for TPUs and GPUs, without one: `python -m experiments.bench.ahead`.

How many kernels there are, which bytes each reads and writes, what lies in memory in between, what
is copied, and how long the compilation takes. All this says how much memory moves, not how long
that takes.
"""
