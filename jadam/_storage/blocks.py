"""Blocks of 128 elements along a leaf's last axis, also where devices cut them."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jadam._types import Shape

BLOCK = 128


def tops_shape(shape: Shape) -> Shape:
    """One top for each block along the last axis."""
    return (*shape[:-1], -(-shape[-1] // BLOCK))


def block_max(
    x: Shaped[Array, "*rows lanes"],
    seen: Callable[[Array], Array],
    together: int | None = None,
) -> Shaped[Array, "*rows blocks"]:
    """The largest seen(x) >= 0 of each block; seen(seen(x)) is seen(x).

    `seen` is part of the reduction. Before it, XLA:CPU would store its result as a whole array. XLA
    cannot reduce so over devices: what each has of a block comes first, and then a plain maximum.
    `together` is how many lanes no device divides, where a kernel knows it.
    """
    n = x.shape[-1]
    together = together or uncut_lanes(n, jax.typeof(x).sharding.mesh)
    if n > BLOCK:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % BLOCK)])
    x = x.reshape(*tops_shape(x.shape), -1, together)
    if together == 1:  # XLA leaves out a reduction of one, and what it sees
        return jnp.max(seen(x), axis=(-2, -1))
    zero = np.zeros((), x.dtype)
    largest = lax.reduce(x, zero, lambda a, b: lax.max(seen(a), seen(b)), (x.ndim - 1,))
    return jnp.max(largest, axis=-1) if x.shape[-2] > 1 else largest.squeeze(-1)


def uncut_lanes(n: int, mesh: Mesh | AbstractMesh) -> int:
    """How many lanes of a block lie together however the mesh divides a last axis of n.

    Where the mesh is not known while tracing, that is taken for a whole block.
    """
    pairs = zip(mesh.shape.values(), mesh.axis_types, strict=True)
    sizes = [size for size, kind in pairs if kind == AxisType.Auto and size > 1]
    parts = {
        math.prod(some)
        for count in range(1, len(sizes) + 1)
        for some in itertools.combinations(sizes, count)
    }
    return math.gcd(min(n, BLOCK), *(n // k for k in parts if n % k == 0 and n // k % BLOCK))


def _parts(x: Array) -> int:
    """Into how many parts explicit axes divide the last axis of x."""
    place = jax.typeof(x).sharding
    if not x.ndim or AxisType.Explicit not in place.mesh.axis_types:
        return 1
    names = place.spec.partitions[-1] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(place.mesh.shape[name] for name in names)


def is_cut(x: Array) -> bool:
    """Whether explicit axes divide x inside of a block: JAX does not reshape it so."""
    parts = _parts(x)
    return parts > 1 and x.shape[-1] // parts % BLOCK > 0


def whole_rows(x: Array) -> Array:
    """x with its last axis whole on each device, where explicit axes divide it."""
    if _parts(x) == 1:
        return x
    place = jax.typeof(x).sharding
    spec = PartitionSpec(*place.spec.partitions[:-1], None, unreduced=place.spec.unreduced)
    return jax.sharding.reshard(x, NamedSharding(place.mesh, spec))


def uncut(x: Array) -> Array:
    """The same where they divide it inside of a block."""
    return whole_rows(x) if is_cut(x) else x


def placed_like(x: Array, like: Array) -> Array:
    """x divided as an array of its shape is."""
    place = jax.typeof(like).sharding
    return x if jax.typeof(x).sharding == place else jax.sharding.reshard(x, place)
