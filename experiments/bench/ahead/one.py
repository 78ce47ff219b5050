"""One program in a process of its own: `python -m experiments.bench.ahead.one CHIP LEAVES NAME`.

The last line that it prints is its figures as JSON.
"""

import json
import sys

from experiments.bench.ahead.compiled import figures
from experiments.bench.ahead.programs import LEAVES, PROGRAMS
from experiments.common.chips import CHIPS

if __name__ == "__main__":
    chip, leaves, name = sys.argv[1:]
    print(json.dumps(figures(PROGRAMS[name](), LEAVES[leaves], CHIPS[chip])))
