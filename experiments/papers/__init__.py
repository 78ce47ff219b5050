"""What papers on Adam show, reproduced by `python -m experiments.papers.AUTHOR_YEAR`."""
