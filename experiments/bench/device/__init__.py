"""What a step takes on a GPU: right numbers, time, memory, and a training, in one command."""
