"""Random programs over the whole interface (tests/programs): what each of them keeps.

Finite gradients give finite numbers; no step is beyond the bound; a bad element poisons itself
alone; shapes and dtypes stay; the kernel's step is XLA's; a saved training goes on bit for bit; and
a step is the same under vmap, on eight devices, with donation and without jit. The oracles are the
bound in float64, and the other way of doing the same. `python -m tests.programs` runs the long
form.
"""

import json

import pytest

from tests.programs import __main__ as long
from tests.programs import drawing
from tests.programs.drawing import draw
from tests.programs.running import Found

# Between them: four members, four storages, a wrapper, two kernels, each way of making a step;
# with the others six members, two wrappers, all kernels. 119 is RAdam from 4 bits in the kernel.
SHORT, OTHERS = (4, 20, 119), (1, 22, 39)


@pytest.mark.parametrize(
    "seed",
    [*SHORT, *(pytest.param(seed, marks=pytest.mark.soak) for seed in OTHERS)],
    ids=lambda seed: f"seed {seed}",
)
def test_a_random_program(seed, standard_promotion):
    """Along two sequences of 200 gradients from 1e-45 to the largest number."""
    assert Found(draw(seed), range(2)).failures == []


def test_every_part_of_a_program_is_drawn():
    """A member, a storage, a wrapper, a dtype or a way that is never drawn would not be tested."""
    drawn = [draw(seed) for seed in range(200)]
    assert {p.member for p in drawn} == set(drawing.MEMBERS)
    assert {p.storage for p in drawn} == set(drawing.STORAGES)
    assert {p.wrapper for p in drawn} == set(drawing.WRAPPERS)
    assert {p.dtypes for p in drawn} == set(drawing.DTYPES)
    assert {way for p in drawn for way in p.ways} == set(drawing.WAYS)


def test_the_committed_report_has_no_failure():
    """What was run once to its end, by the command in its module."""
    report = json.loads(long.PATH.read_text())
    assert report["failures"] == []
    assert report["programs"] >= 2_000
    assert set(report["counts"]["storage"]) == set(drawing.STORAGES)


def test_the_committed_report_is_of_what_the_seeds_draw_now():
    """A change of `draw` would leave results that are of other programs than their seeds' own."""
    done = json.loads(long.PATH.read_text())["configurations"]
    for seed, record in done.items():
        program = draw(int(seed))
        assert record["dtypes"] == " ".join(program.dtypes), seed
        assert record["ways"] == list(program.ways), seed
        for name in ("member", "storage", "wrapper", "kernel"):
            assert record[name] == getattr(program, name), seed
