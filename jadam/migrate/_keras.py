"""The variables of keras.optimizers.Adam, AdamW, Nadam and Adamax; Keras is not imported."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jadam import _validate
from jadam._search import Maximum, check_flushed, check_maximum, states_in
from jadam._types import PyTree
from jadam.migrate._foreign import (
    Address,
    Name,
    Table,
    addresses,
    arrived,
    check_product,
    count_of,
    departing,
    filled,
    host_array,
    mapping,
    momentum_product,
    update_count,
)


def _prefix(variables: Any) -> str:
    """What the optimizer's own variables begin with, such as "adam/"."""
    for key in mapping("variables", variables):
        if not isinstance(key, str):
            raise TypeError(f"variables: expected the variables' paths as keys, got {key!r}")
    found = [key for key in variables if key.split("/")[-1] == "iteration"]
    if len(found) != 1:
        raise ValueError(f"variables: expected one key 'iteration' or '.../iteration', got {found}")
    return found[0].removesuffix("iteration")


def _key(prefix: str, address: Address, field: str, adamax: bool) -> str:
    """The key of a moment: Keras joins a parameter's path by underscores."""
    if not isinstance(address.key, str):
        raise TypeError(f"{address.where}: expected the path of a variable, got {address.key!r}")
    ending = {
        "mu": "momentum",
        "nu": "norm" if adamax else "velocity",
        "nu_max": "velocity_hat",
    }[field]
    return f"{prefix}{address.key.replace('/', '_')}_{ending}"


def _is_product(key: str) -> bool:
    """Whether this is Nadam's product of momenta, which Keras gives no name."""
    return re.fullmatch(r"(.*/)?variable(_\d+)?", key) is not None


def from_keras(
    variables: Mapping[str, Any],
    like: PyTree,
    name: Name,
    *,
    b1: float = 0.9,
    maximum: Maximum = None,
    adamax: bool = False,
) -> PyTree:
    """The state that goes on where Keras's Adam, AdamW, Nadam or Adamax stopped.

    As `from_torch`. Keras has eps elsewhere: in Adam and AdamW it is added before v's bias
    correction, in Adamax outside the maximum. Nadam is `jadam.nadam(..., momentum_decay=1.0)`.

    Args:
        variables: `{v.path: v.numpy() for v in optimizer.variables}`.
        like: as in `from_torch`.
        name: the function from a path in `params`, such as "fc1.kernel", to the variable's path
            in Keras, "sequential/fc1/kernel"; or to that and the axes of Keras's array in the
            order that jadam's has.
        b1: Nadam's beta_1, with which its product of momenta is checked.
        maximum: must be "raw" where there is AMSGrad.
        adamax: whether it is Adamax.

    Raises:
        TypeError: an entry is not what Keras has there, or a leaf of `like` holds codes.
        ValueError: an entry is missing, not expected, of a wrong shape or out of range; a moment
            is one that no gradients make beside another (NaN in one alone, a first beyond a
            million times the root of the second, a maximum below the second).

    >>> import jax.numpy as jnp, numpy as np, jadam
    >>> state = jadam.migrate.from_keras(
    ...     {
    ...         "adam/iteration": 7,
    ...         "adam/learning_rate": 1e-3,
    ...         "adam/dense_kernel_momentum": np.ones((3, 2)),
    ...         "adam/dense_kernel_velocity": np.ones((3, 2)),
    ...     },
    ...     jadam.adam(1e-3).init({"dense": {"kernel": jnp.ones((3, 2))}}),
    ...     lambda path: path.replace(".", "/"),
    ... )
    >>> int(state[0].count)
    7
    """
    prefix, states = _prefix(variables), states_in("like", like)
    check_maximum((found.state for found in states), maximum, "raw", "Keras")
    table = Table(
        {
            f"variables[{key!r}]": value
            for key, value in variables.items()
            if key != f"{prefix}learning_rate"
        }
    )
    iteration = f"variables[{prefix + 'iteration'!r}]"
    count = update_count(iteration, table.take(iteration))
    moments = [
        table.moments(
            address,
            {
                field: f"variables[{_key(prefix, address, field, adamax)!r}]"
                for field in address.parameter.moments
            },
            power=1 if adamax else 2,
        )
        for address in addresses(states, name)
    ]
    b1 = float(_validate.decay_rate("b1", b1))
    for product in (f"variables[{key!r}]" for key in variables if _is_product(key)):
        check_product(product, table.take(product), count, b1, 1.0)
    table.check_all_taken()
    return filled(like, moments, count)


def to_keras(
    state: PyTree,
    variables: Mapping[str, Any],
    name: Name,
    *,
    b1: float = 0.9,
    maximum: Maximum = None,
    adamax: bool = False,
) -> dict[str, np.ndarray]:
    """The variables with which a Keras optimizer goes on: `from_keras` the other way.

    Args:
        state: jadam's state, in any chain.
        variables: those of the optimizer that goes on, after `optimizer.build(...)`, as in
            `from_keras`. Their shapes and dtypes hold; the learning rate stays.
        name: as in `from_keras`, as are the other arguments.

    Returns:
        An array for each of them, in their order: `v.assign(found[v.path])`.

    Raises:
        TypeError: moments are codes or complex.
        ValueError: a variable has no leaf or a leaf no variable, or shapes differ.
    """
    prefix, states = _prefix(variables), states_in("state", state)
    check_flushed(states)
    check_maximum((found.state for found in states), maximum, "raw", "Keras")
    count, b1 = count_of(states), float(_validate.decay_rate("b1", b1))
    found: dict[str, Any] = {f"{prefix}iteration": count}
    for address in addresses(states, name):
        for field in address.parameter.moments:
            key = _key(prefix, address, field, adamax)
            if key not in variables:
                raise ValueError(
                    f"variables[{key!r}] is missing: {address.parameter.where(field)} exists"
                )
            found[key] = departing(address, field)

    def variable(key: str, value: Any) -> np.ndarray:
        where = f"variables[{key!r}]"
        like = host_array(where, value)
        if key == f"{prefix}learning_rate":
            return like.copy()
        if _is_product(key):
            return np.asarray(momentum_product(count, b1, 1.0), like.dtype)
        if key not in found:
            raise ValueError(f"{where} is not expected: no leaf of state is for it")
        if key == f"{prefix}iteration":
            return np.asarray(count, like.dtype)
        return arrived(where, found[key], like)

    return {key: variable(key, value) for key, value in variables.items()}
