"""Programs that people already run, each with optax's Adam and with jadam's in its place."""
