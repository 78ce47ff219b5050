"""A state's moments as numbers, whatever they are stored in."""

from jadam import _validate
from jadam._search import dense_in, states_in, with_moments
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
        `jadam.migrate.cast_like` changes a storage. In place of a state of `jadam.rows` it has
        the dense state: moments that have faded since the last update of their row, but for the
        eps under which AdaMax's u does not fade. With `catch_up=False` they stand still: pass the
        field `dense`.

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

    found = states_in("state", state, adamax=adamax)
    numbers = (each.numbers(parameter, rates) for each in found for parameter in each.parameters)
    return with_moments(dense_in(state), numbers)
