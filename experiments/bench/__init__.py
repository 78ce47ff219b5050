"""Accuracy, speed and memory, side by side with peers: `python -m experiments.bench`."""
