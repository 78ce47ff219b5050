"""A page of sliders: paths, loss curves and Adam's inner values, computed by jadam at once."""
