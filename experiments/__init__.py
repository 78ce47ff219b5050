"""Programs that use jadam: each folder is one, started with `python -m experiments.NAME`."""
