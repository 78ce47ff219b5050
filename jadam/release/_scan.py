"""A scan over layers whose parameters may be stepped in its backward pass."""

import contextvars
from collections.abc import Callable
from typing import Any, Protocol

from jax import lax

from jadam._types import PyTree


class Run(Protocol):
    """What a scan turns to while a train step is traced."""

    def scan(
        self,
        f: Callable[..., Any],
        init: PyTree,
        xs: PyTree,
        *,
        length: int | None,
        reverse: bool,
        unroll: int | bool,
    ) -> Any:
        """As `scan`."""
        ...


current: contextvars.ContextVar[Run | None] = contextvars.ContextVar("current", default=None)


def scan(
    f: Callable[..., tuple[PyTree, PyTree]],
    init: PyTree,
    xs: PyTree,
    length: int | None = None,
    *,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`, which a train step from `jadam.release.train_step` can release.

    Everywhere else it is `jax.lax.scan` itself. In the loss of such a train step the parameters
    among xs are released: in the backward pass each layer's slice is stepped, with its state, as
    soon as its gradient is there, and no gradient of the stack is ever made. This needs the
    parameters as the loss got them (cast them in f, not before), whole and once, and the scan
    directly in the loss: `jax.checkpoint` and `jax.jit` go around f, not around the scan.

    Args:
        f: `(carry, x) -> (carry, y)`. Wrap it in `jax.checkpoint`, as in any scan over layers:
            else what it makes of its parameters, such as their bfloat16 copies, is kept as a stack.
        init: the first carry.
        xs: a tree of arrays, stacked along their first axes: parameters, and others as well.
        length: the number of layers, if xs has no array.
        reverse: from the last layer to the first.
        unroll: as in `jax.lax.scan`.

    Returns:
        The last carry, and the stacked ys.

    Raises:
        ValueError: a parameter is scanned twice, or inside of another transformation of JAX.

    >>> import jax.numpy as jnp, jadam
    >>> layers = {"w": jnp.full((3, 2), 0.5)}
    >>> x, _ = jadam.release.scan(lambda x, p: (x * p["w"], None), jnp.ones(2), layers)
    >>> x.tolist()
    [0.125, 0.125]
    """
    run = current.get()
    loop = lax.scan if run is None else run.scan
    return loop(f, init, xs, length=length, reverse=reverse, unroll=unroll)
