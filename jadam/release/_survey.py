"""Which parameters a loss scans over: found out by tracing it once, before it is differentiated."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jadam._layers import near
from jadam._traced import current_trace
from jadam._types import PyTree
from jadam.release import _scan

ONCE = "its gradient would not be whole when its step is made"
INSTEAD = (
    "call it directly in the loss; jax.checkpoint, jax.jit and jax.vmap go around the function "
    "that it scans, and gradients cannot be accumulated over several passes: add up the examples "
    "of a larger batch inside of one, or do not release"
)


def released(loss: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> list[str]:
    """The paths of the parameters that a train step of this loss releases.

    All others get their step from a whole gradient, which is right as well, but needs its memory.

    Args:
        loss: as in `train_step`.
        params: the parameters, or their shapes and dtypes.
        args: what the loss takes beside them, or the shapes and dtypes of it; `kwargs` likewise.

    Raises:
        ValueError: as in `train_step`, but not where nothing is released.

    >>> import jax.numpy as jnp, jadam
    >>> def loss(params, x):
    ...     layer = lambda x, p: (x * p["w"], None)
    ...     return jadam.release.scan(layer, x, params["layers"])[0] + params["bias"]
    >>> params = {"bias": jnp.ones(()), "layers": {"w": jnp.ones(3)}}
    >>> jadam.release.released(loss, params, jnp.ones(()))
    ["params['layers']['w']"]
    """
    names = names_of(params)
    return [names[number] for number in survey(loss, params, args, kwargs)]


def names_of(params: PyTree) -> list[str]:
    """The paths of the leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [f"params{jax.tree_util.keystr(path)}" for path, _ in flat]


def survey(
    loss: Callable[..., Any], params: PyTree, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[int]:
    """The numbers of the leaves that are released, in their order."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda x: jax.tree.map(near, x), params))
    found = Survey(names_of(params))

    def traced(*leaves: Any) -> Any:
        found.begin(leaves)
        token = _scan.current.set(found)
        try:
            result = loss(structure.unflatten(leaves), *args, **kwargs)
        finally:
            _scan.current.reset(token)
        return [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)]

    jaxpr = jax.make_jaxpr(traced)(*leaves).jaxpr
    used = {id(v) for e in jaxpr.eqns for v in e.invars} | {id(v) for v in jaxpr.outvars}
    for number in sorted(found.seen):
        if id(jaxpr.invars[number]) in used:
            raise ValueError(
                f"{found.names[number]}: expected no use of it in the loss but in one "
                f"jadam.release.scan, got another one; {ONCE}"
            )
    return sorted(found.seen)


class Survey:
    """Notes which parameters are scanned; its scans compute with zeros in their place."""

    def __init__(self, names: list[str]):
        self.names = names
        self.seen: set[int] = set()
        self._numbers: dict[int, int] = {}
        self._level: Any = None

    def begin(self, leaves: Sequence[Any]) -> None:
        """The tracers that stand for the parameters, and the level of the trace that is theirs."""
        self._leaves = leaves  # no other object may get their ids
        self._numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        self._level = current_trace()

    def scan(self, f: Callable[..., Any], init: PyTree, xs: PyTree, **options: Any) -> Any:
        """Notes the parameters among xs."""

        def note(leaf: Any) -> Any:
            number = self._numbers.get(id(leaf))
            if number is None:
                return leaf
            if current_trace() != self._level:
                raise ValueError(
                    f"{self.names[number]}: got jadam.release.scan inside of another "
                    f"transformation of JAX or another scan; {INSTEAD}"
                )
            if number in self.seen:
                raise ValueError(
                    f"{self.names[number]}: expected to scan it once, got it twice; {ONCE}"
                )
            self.seen.add(number)
            return jnp.zeros_like(leaf)

        return lax.scan(f, init, jax.tree.map(note, xs), **options)
