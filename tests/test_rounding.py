"""Dithered rounding: to a neighbour, unbiased, deterministic, and harmless at the edges."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jadam import _rounding

NARROW = ("bfloat16", "float16")


@pytest.mark.parametrize("dtype", NARROW)
@given(
    x=st.floats(width=32, allow_subnormal=False),
    t=st.integers(0, 2**31 - 1),
    salt=st.integers(0, 2),
)
def test_rounds_to_one_of_the_two_neighbours(dtype, x, t, salt):
    """Never farther than the next number of the dtype; exact numbers, inf and NaN stay."""
    rounded = _rounding.round_dithered(jnp.float32(x), jnp.dtype(dtype), jnp.int32(t), salt)
    assert rounded.dtype == dtype
    value = float(rounded)
    largest = float(jnp.finfo(dtype).max)
    if np.isnan(x) or np.isinf(x):
        np.testing.assert_equal(value, x)
    elif abs(x) > largest:
        assert abs(value) >= largest  # it overflows to inf as a plain conversion does
    else:
        nearest = float(jnp.float32(x).astype(dtype))
        if nearest == x and abs(x) >= 2**-118:
            assert value == x
        # Below 2⁻¹¹⁸ the grid of bfloat16 is as coarse as float32's smallest normal number.
        spacing = grid(x, dtype)
        assert abs(value - x) < spacing
        assert abs(value) <= largest


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("x", [1.003, -0.7391, 3.14159e-3, 1.9999, 1.3e-33])
def test_is_unbiased_over_time_and_over_lanes(dtype, x):
    """The mean over n steps is x to one spacing over n: a low discrepancy, not 1/√n."""
    n = 1000
    xs = jnp.full((n, 64), x, jnp.float32)
    rounded = jax.vmap(lambda x, t: _rounding.round_dithered(x, jnp.dtype(dtype), t))(
        xs, jnp.arange(n)
    )
    spacing = grid(x, dtype)
    over_time = np.mean(np.asarray(rounded, np.float64), axis=0) - float(np.float32(x))
    # The golden ratio's discrepancy after n points is under (1 + log n)/n ≈ 8/n.
    assert np.abs(over_time).max() <= 8 / n * spacing
    over_lanes = np.mean(np.asarray(rounded, np.float64), axis=1) - float(np.float32(x))
    assert np.abs(over_lanes).max() <= 8 / 64 * spacing


def grid(x, dtype):
    """The distance of the numbers of `dtype` around x; as coarse as float32's smallest below."""
    digits = {"bfloat16": 7, "float16": 10}[dtype]
    smallest = {"bfloat16": 2.0**-126, "float16": 2.0**-24}[dtype]
    return max(2.0 ** (np.floor(np.log2(abs(x))) - digits), smallest) if x else smallest


def test_spacing_is_float32s():
    """The unit in the last place, at powers of two and between; 0 at 0."""
    x = np.asarray([*2.0 ** np.arange(-100, 120, 7), 1.9999999, 3.14e-7, 1e30], np.float32)
    np.testing.assert_array_equal(_rounding.spacing(jnp.asarray(x)), np.spacing(x))
    assert _rounding.spacing(jnp.float32(0)) == 0


def test_the_dither_does_not_depend_on_how_an_array_is_cut():
    """Shards that begin at multiples of 128 on the last axis get the bits of the whole."""
    whole = _rounding.weyl((4, 512), jnp.int32(7))
    part = _rounding.weyl((2, 128), jnp.int32(7))
    for row in (0, 2):
        for column in range(0, 512, 128):
            np.testing.assert_array_equal(whole[row : row + 2, column : column + 128], part)
    assert _rounding.weyl((), jnp.int32(7)) == part[0, 0]


def odd(x):
    """The odd integer nearest to x."""
    return 2 * round((x - 1) / 2) + 1


STEP, OTHER_STEP = odd(2**32 / ((1 + 5**0.5) / 2)), odd(2**32 * (2**0.5 - 1))
LANE = odd(2**32 / 1.3247179572447460)  # the plastic number: its cube is one more than itself
SALT = 0x85EBCA6B  # as the kernel in C++ has it


def dither(n, t, salt=0, step=STEP):
    return np.asarray(
        [(i % 128 * LANE + t * step + salt * SALT) % 2**32 for i in range(n)], np.uint32
    )


@pytest.mark.parametrize("t", [0, 1, 12345, 2**31 - 1])
def test_the_dither_is_two_irrational_numbers_times_lane_and_step(t):
    """lane·2³²/ρ + t·2³²/φ mod 2³² to the bit, with odd integers; or t·2³²·(√2-1); and a salt."""
    for found, expected in (
        (_rounding.weyl((2, 300), jnp.int32(t)), dither(300, t)),
        (_rounding.weyl((2, 300), jnp.int32(t), 3), dither(300, t, 3)),
        (
            _rounding.weyl((2, 300), jnp.int32(t), step=_rounding.OTHER_STEP),
            dither(300, t, step=OTHER_STEP),
        ),
    ):
        np.testing.assert_array_equal(found, [expected] * 2)


@pytest.mark.parametrize(("dtype", "cut"), [("bfloat16", 16), ("float16", 13)])
def test_the_dither_is_added_to_the_bits_that_are_cut(dtype, cut):
    """⌊|x|/s + u⌋·s is a sum of integers: the bits of x and the first of the dither."""
    rng = np.random.default_rng(0)
    # In float16's normal numbers, from 2⁻¹⁴ to 2¹⁶.
    x = (rng.choice([-1, 1], 300) * 2.0 ** rng.uniform(-13, 15, 300)).astype(np.float32)
    bits = np.abs(x).view(np.uint32)
    for t in (1, 2, 1000):
        whole = (bits + (dither(300, t) >> (32 - cut))) >> cut << cut
        expected = np.copysign(whole.view(np.float32), x)
        rounded = _rounding.round_dithered(jnp.asarray(x), jnp.dtype(dtype), jnp.int32(t))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), expected)
    for function, most in ((_rounding.round_to_zero, 0), (_rounding.round_from_zero, 2**cut - 1)):
        whole = (bits + np.uint32(most)) >> cut << cut
        expected = np.copysign(whole.view(np.float32), x)
        rounded = function(jnp.asarray(x), jnp.dtype(dtype)).astype(jnp.float32)
        np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_grid_is_the_dtypes_down_to_float32s_smallest_number(dtype):
    """At powers of two and between; at 0 and under float16's or float32's smallest it ends."""
    x = np.asarray([0, *2.0 ** np.arange(-126, 16), *1.99 * 2.0 ** np.arange(-126, 15)], np.float32)
    found = _rounding.grid(jnp.asarray(x), jnp.dtype(dtype))
    np.testing.assert_array_equal(found, [grid(x, dtype) for x in x.astype(float)])


def test_a_slice_of_a_stack_knows_its_place():
    """The elements before it are counted modulo 2³², and its dither is what the stack has there."""
    whole = _rounding.weyl((300,), jnp.int32(7))
    for index in (0, 1, 5):
        with _rounding.as_layer(jnp.uint32(index)):
            assert _rounding.is_slice()
            for size in (50, 2**31 + 5, 2**32 + 7):
                assert int(_rounding.elements_before(size)) == index * size % 2**32
            part = _rounding.weyl((50,), jnp.int32(7))
            row = _rounding.weyl((1, 300), jnp.int32(7))
        np.testing.assert_array_equal(part, whole[50 * index : 50 * index + 50])
        np.testing.assert_array_equal(row[0], whole)
    assert not _rounding.is_slice()
    assert _rounding.elements_before(2**33) == 0
