"""`python -m experiments.papers.kingma_ba_2015`; `--help` lists the options."""

from experiments.papers.publish import command_line

from .figures import NAME, Config, main

if __name__ == "__main__":
    command_line(NAME, Config, main)
