"""The README and the pages of docs: their code runs as written, their figures are the committed."""

import doctest
import inspect
import json
import re
from pathlib import Path

import griffe
import pytest

import jadam
from docs import tables
from docs.arguments import Arguments
from experiments.bench import accuracy, publish, speed
from experiments.bench.device import tables as device
from experiments.bench.drift import report as drift
from experiments.common import report
from experiments.lowmem import report as lowmem
from experiments.lowmem.long import report as long

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
# A block of Python, and what it prints where the page says so; "..." stands for anything.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)
BLOCKS = {
    f"{page.relative_to(ROOT).as_posix()}, block {place}": found
    for page in PAGES
    for place, found in enumerate(BLOCK.findall(page.read_text()))
}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_runs_as_written(name, capsys, standard_promotion):
    """Each block by itself, as a reader would paste it, under JAX's defaults."""
    code, expected = BLOCKS[name]
    exec(compile(code, name, "exec"), {})
    printed = capsys.readouterr().out
    if expected:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(expected, printed, flags), printed


LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)[^)]*\)|<img src=\"([^\"]+)\"")


def test_links_lead_somewhere():
    """Each relative link and picture of the Markdown files is there."""
    readmes = [ROOT / "CHANGELOG.md", *sorted(ROOT.glob("experiments/**/README.md"))]
    links = [(page, a or b) for page in PAGES + readmes for a, b in LINK.findall(page.read_text())]
    assert links
    broken = [
        f"{page.relative_to(ROOT)}: {to}" for page, to in links if not (page.parent / to).exists()
    ]
    assert not broken


@pytest.mark.parametrize(
    ("name", "page"), tables.blocks(), ids=[name for name, _ in tables.blocks()]
)
def test_the_figures_are_the_committed_ones(name, page):
    """No figure in the tables was typed by hand."""
    assert report.readme_block(name, page)[1] == tables.blocks()[name, page] + "\n"


def test_the_full_tables_are_the_committed_ones():
    """Nor in the READMEs of the bench and of the small-memory study."""
    block = report.readme_block("speed-full", publish.README)[1]
    assert block == speed.of_each(speed.committed(), speed.full_markdown) + "\n"
    block = report.readme_block("device", publish.README)[1]
    assert block == device.markdown(publish.RESULTS) + "\n"
    results = json.loads((lowmem.HERE / "results" / "lowmem.json").read_text())
    block = report.readme_block("lowmem", lowmem.HERE / "README.md")[1]
    assert block == lowmem.markdown(results) + "\n"
    block = report.readme_block("long", long.README)[1]
    assert block == long.markdown(long.committed()) + "\n"
    for name, expected in drift.blocks().items():
        assert report.readme_block(name, drift.README)[1] == expected + "\n"


ENTRIES = {
    entry
    for page in (ROOT / "docs" / "pages" / "reference").glob("*.md")
    for entry in re.findall(r"^::: jadam\.(\S+)", page.read_text(), re.M)
}


def test_the_reference_has_every_public_name():
    """What is public has an entry: of the package, and of the modules in it."""
    modules = {name: x for name in jadam.__all__ if inspect.ismodule(x := getattr(jadam, name))}
    inside = {f"{name}.{entry}" for name, module in modules.items() for entry in module.__all__}
    assert set(jadam.__all__) | inside <= ENTRIES | modules.keys()


def test_the_reference_describes_every_argument():
    """As `make docs` reads the package, which an argument that is described nowhere would stop."""
    package = griffe.load(
        "jadam", search_paths=[ROOT], extensions=griffe.load_extensions(Arguments())
    )
    kind = griffe.DocstringSectionKind.parameters
    for name in ENTRIES:
        entry = package[name].final_target if package[name].is_alias else package[name]
        if entry.is_function:
            described = [x for s in entry.docstring.parsed if s.kind is kind for x in s.value]
            taken = [p.name for p in entry.parameters if p.kind.name != "var_keyword"]
            assert [x.name for x in described] == taken, name
            assert all(x.description.strip() for x in described), name


def test_a_user_sees_the_public_names_and_nothing_else():
    """`dir(jadam)` and completion; nothing without an underscore is left out of `__all__`."""
    assert dir(jadam) == sorted(jadam.__all__)
    assert {name for name in vars(jadam) if not name.startswith("_")} == set(jadam.__all__)


LIMITS = {"ulps": 5}  # as tests/test_math.py has it, with the reason


# tests/test_math.py has what these say, for more hyperparameters.
LONG = ("ulps", "drift_b2_0.999", "drift_b2_0.9999", "drift_b2_0.99999", "decay")


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.soak] * (row.name in LONG)) for row in accuracy.ROWS],
    ids=lambda row: row.name,
)
def test_the_committed_figures_are_what_the_code_computes(row):
    """Every row that holds for jadam in the committed table holds now."""
    committed = json.loads((publish.RESULTS / "accuracy.json").read_text())["rows"]
    now, then = accuracy.measured(row, accuracy.jadam), committed[row.name]["jadam"]
    if isinstance(now, str) or isinstance(row.exact, str):
        assert now == then == row.exact
    else:
        # Three digits of the exact value, or an error under 1e-4.
        limit = LIMITS.get(row.name, 1e-4)
        assert now == pytest.approx(row.exact, rel=5e-3, abs=limit)
