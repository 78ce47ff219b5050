"""MNIST: the four original files, what is in them, and the CNN that several experiments train."""
