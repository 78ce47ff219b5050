"""A state's moments as numbers, whatever they are stored in."""

from typing import Any

import jax.numpy as jnp

from jadam import _math, _validate
from jadam._search import Found, Parameter, states_in, with_moments
from jadam._types import PyTree, Scalar


def moments(
    state: PyTree,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    adamax: bool = False,
    **rates: Scalar,
) -> PyTree:
    """A state with its moments as numbers, in float32 or wider: for logging and for tools.

    Moments of 8 and 4 bits are codes, of which a norm or a histogram means nothing. Here `mu` and
    `nu` have the parameters' shapes and the values that the next step starts from. Use it inside
    jit where the numbers are reduced there, so that no array of a parameter's size is made.

    Args:
        state: a state with states of this family anywhere in it.
        b1: the optimizer's, as is `b2`: codes refer to them.
        b2: see b1.
        adamax: whether the state is `adamax`'s, with u in `nu`.
        **rates: its other decay rates, where the member has more than two.

    Returns:
        The tree with other arrays in the states of the family, which no update takes from codes:
        `jadam.migrate.cast_like` changes a storage.

    Raises:
        ValueError: there is no state of the family, or a rate is out of range.

    >>> import jax.numpy as jnp, jadam, optax
    >>> tx = jadam.adam(1e-3, mu_dtype="int8", nu_dtype="uint8")
    >>> params = jnp.ones((64, 64))
    >>> _, state = tx.update(params, tx.init(params))
    >>> round(float(optax.tree.norm(jadam.moments(state)[0].mu)), 1)  # 0.1·64 within a code
    6.3
    """
    rates |= {"b1": _validate.decay_rate("b1", b1), "b2": _validate.decay_rate("b2", b2)}

    def numbers(found: Found, parameter: Parameter) -> tuple[Any, ...]:
        wide = parameter.storage.wide(jnp.dtype(jnp.float32))
        count: Any = found.state.count
        time = _math.Time.of(count, jnp.finfo(wide).dtype)
        return parameter.storage.load(
            parameter.stored, lambda: found.member.relation_at(time, **rates), wide
        )

    found = states_in("state", state, adamax=adamax)
    return with_moments(
        state, (numbers(each, parameter) for each in found for parameter in each.parameters)
    )
