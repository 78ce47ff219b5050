"""The study of drift: its gradients have the moments that it says, and its errors can be large."""

import numpy as np
import pytest

from experiments.bench.drift import measure, tasks
from experiments.bench.drift.gradients import GROUPS, Gradients
from experiments.bench.drift.storages import EIGHT_BITS, FLOAT32, NEAREST


def test_the_gradients_have_the_moments_that_they_say():
    """E[g²] before and after the change of scale, to what 4,000 steps of 128 elements tell."""
    gradients = Gradients(8000)
    for first in (1, 4001):
        g = gradients.at(first, 4000).astype(np.float64)
        relative = np.sqrt(np.square(g).mean(0)) / gradients.root(first)
        for label in GROUPS:
            # Half of the rare ones come a block at once: 8 times are expected of two blocks, and
            # 16 are seen in one of the pieces. The others are means of a million squares or more.
            within = 0.6 if label == "once in 1,000 steps" else 0.01
            mean = np.square(relative[gradients.group(label)]).mean()
            assert mean == pytest.approx(1, abs=within), label
    group = gradients.group("after 1,000 times more")
    ratio = gradients.scale(4001)[group] / gradients.scale(4000)[group]
    np.testing.assert_allclose(ratio, 1000)


def test_the_groups_are_apart():
    """No element counts twice, and none is left out."""
    assert (sum(Gradients(10).group(label).astype(int) for label in GROUPS) == 1).all()


@pytest.mark.usefixtures("either_compilation")
@pytest.mark.usefixtures("standard_promotion")  # the bench's candidates are written for it
def test_drift_is_found_where_it_is():
    """Codes to nearest lag behind; jadam's do not, and float32 has its roundings alone."""
    storages, rates = (FLOAT32, EIGHT_BITS, NEAREST), ((0.9, 0.999),)
    found = measure.curves(storages, rates, steps=2000, points=2, every=20)
    assert found["steps"] == [1000, 2000]
    late = {
        name: {x: row["0.9, 0.999"]["stationary"][x][-1] for x in measure.QUANTITIES}
        for name, row in found["storages"].items()
    }
    # A few roundings of 6e-8 in each of the last 1,000 steps.
    assert all(abs(x) < 1e-4 for x in late[FLOAT32.name].values())
    assert abs(late[EIGHT_BITS.name]["root bias"]) < 0.02  # half a level: no bias
    assert late[NEAREST.name]["root bias"] < -0.1


@pytest.mark.usefixtures("either_compilation")
def test_a_task_shows_a_loss_where_there_is_one():
    """Gradients over 24 octaves in a block are 8 more than the codes have; over 8 they fit."""
    wide, fits = (
        next(task for task in tasks.TASKS if task.octaves == octaves)._replace(steps=1000)
        for octaves in (24, 8)
    )
    found = tasks.search((EIGHT_BITS,), (wide, fits))
    larger = [found[task.what]["storages"][EIGHT_BITS.name]["mean"] for task in (wide, fits)]
    assert larger[0] > 1
    assert abs(larger[1]) < 0.05
