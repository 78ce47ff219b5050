"""The README: its code runs as written, and its figures are the committed measurements."""

import json
import re
from pathlib import Path

import pytest

from experiments.bench import accuracy, publish, speed
from experiments.common import report
from experiments.lowmem import report as lowmem

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PRINTED = [
    None,
    r"loss 0\.0000\d+ after 1000 updates",
    r"\[0\.\d+ .*\]",
    r"loss \d\.\d+e-\d+",
    r"True (native|xla).*",
    r"2\.04 bytes a parameter",
    r"-?0\.00\d+|-?\d\.\d+e-0\d",
    r"512 rows of codes in \d+ parts",
    r"100 updates made",
    r"\['unused'\]: eps_share 1\.00, zero_share 1\.00\n"
    r"\['used'\]: eps_share 1\.00, zero_share 0\.00",
]


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_code_runs_as_written(block, capsys, standard_promotion):
    """Each block by itself, as a reader would paste it, under JAX's defaults."""
    exec(compile(BLOCKS[block], f"README.md, block {block}", "exec"), {})
    printed = capsys.readouterr().out
    if PRINTED[block]:
        assert re.fullmatch(PRINTED[block] + r"\n", printed)


@pytest.mark.parametrize("table", [accuracy, speed])
def test_the_figures_are_the_committed_ones(table):
    """No figure in the tables was typed by hand."""
    name = table.__name__.split(".")[-1]
    results = json.loads((publish.RESULTS / f"{name}.json").read_text())
    assert report.readme_block(name)[1] == table.markdown(results) + "\n"


def test_the_full_tables_are_the_committed_ones():
    """Nor in the READMEs of the bench and of the small-memory study."""
    results = json.loads((publish.RESULTS / "speed.json").read_text())
    block = report.readme_block("speed-full", publish.README)[1]
    assert block == speed.full_markdown(results) + "\n"
    results = json.loads((lowmem.HERE / "results" / "lowmem.json").read_text())
    block = report.readme_block("lowmem", lowmem.HERE / "README.md")[1]
    assert block == lowmem.markdown(results) + "\n"
    assert report.readme_block("memory")[1] == lowmem.peers_table(results["memory"]) + "\n"


LIMITS = {"ulps": 5}  # as tests/test_math.py has it, with the reason


def test_the_committed_figures_are_what_the_code_computes():
    """Every row that holds for jadam in the committed table holds now."""
    committed = json.loads((publish.RESULTS / "accuracy.json").read_text())["rows"]
    for row in accuracy.ROWS:
        now, then = accuracy.measured(row, accuracy.jadam), committed[row.name]["jadam"]
        if isinstance(now, str) or isinstance(row.exact, str):
            assert now == then == row.exact, row.name
        else:
            # Three digits of the exact value, or an error under 1e-4.
            limit = LIMITS.get(row.name, 1e-4)
            assert now == pytest.approx(row.exact, rel=5e-3, abs=limit), row.name
