"""A step under `jax.shard_map`: each device steps the part of each leaf that lies on it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jadam._storage import BLOCK
from jadam._transform import is_local
from jadam._types import PyTree
from jadam.sharding._rules import divided, owner_of, state_shardings

Step = Callable[[PyTree, Any, PyTree], tuple[PyTree, Any]]


def step_in_parts(
    tx: Any,
    params: PyTree,
    shardings: PyTree = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> Step:
    """`tx.step` by each device for its own part of each leaf, under `jax.shard_map`.

        (p, s)[part of device d] ← step((g, s, p)[part of device d])

    The bits are those of `tx.step`, and nothing is sent. Under automatic sharding XLA divides a
    step by itself; a kernel for TPUs it cannot divide, so that 8-bit moments and compensated
    weights on several TPUs need this to have theirs. For FSDP the shardings are those of the
    parameters; for ZeRO-1 those of `divided`, or `axis`: what comes whole is cut, and the jit's
    `out_shardings` gather the parameters again. The gradients are to be summed over the devices, as
    they are where a loss is differentiated under automatic sharding.

        step = jax.jit(step_in_parts(tx, params), donate_argnums=(1, 2))

    Args:
        tx: one of the family, or `compensated_weights` around one: a part's step is then that part
            of the step. A mask is called with the parts.
        params: as in `state_shardings`, like `shardings`, `mesh` and `axis`. The state is to lie
            as that says for the same arguments.

    Returns:
        `step(grads, state, params) -> (params, state)`.

    Raises:
        TypeError: a step of tx needs more than a part (a chain, a global norm, random bits), or a
            parameter has no sharding on a mesh.
        ValueError: shardings are on several meshes, or a last axis is cut inside of a block of 128
            whose state has fewer than 32 bits: it would be coded or rounded otherwise.

    >>> import jax, jax.numpy as jnp, jadam
    >>> from jadam.sharding import state_shardings, step_in_parts
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> rows = jax.NamedSharding(mesh, jax.P("data"))
    >>> params = {"w": jax.device_put(jnp.ones((64, 1024)), rows)}
    >>> tx = jadam.adamw(1e-3, mu_dtype="int8", nu_dtype="uint8")
    >>> state = jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)
    >>> step = jax.jit(step_in_parts(tx, params))
    >>> params, state = step(params, state, params)
    >>> all(x.sharding.is_equivalent_to(rows, 2) for x in (params["w"], state[0].nu["w"]))
    True
    """
    if not is_local(tx):
        raise TypeError(
            "tx: expected one of jadam's family, or compensated_weights around one, whose step of "
            f"a part needs that part alone; got {tx!r}; step others under automatic sharding"
        )
    own = divided(params, shardings, mesh=mesh, axis=axis or ())
    lies = (own, state_shardings(tx, params, own))
    _check_blocks(tx, params, own)
    meshes = {x.mesh for x in jax.tree.leaves(own)}
    if len(meshes) != 1:
        raise ValueError(f"shardings: expected all on one mesh, got {sorted(map(str, meshes))}")
    of_params, of_state = jax.tree.map(lambda sharding: sharding.spec, lies)
    # What a kernel in Pallas writes does not say along which axes it varies.
    return jax.shard_map(
        tx.step,
        mesh=meshes.pop(),
        in_specs=(of_params, of_state, of_params),
        out_specs=(of_params, of_state),
        check_vma=False,
    )


def _check_blocks(tx: Any, params: PyTree, shardings: PyTree) -> None:
    """No block of 128 with a state of fewer bits, coded or dithered by lanes, is cut."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    owners = dict(leaves)
    cut: dict[Any, NamedSharding] = {}
    for (path, p), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        shape = np.shape(p)
        n = sharding.shard_shape(shape)[-1] if shape else 0
        if shape and n != shape[-1] and n % BLOCK:
            cut[path] = sharding
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(np.shape(p), jnp.result_type(p)), params)
    for path, x in jax.tree_util.tree_flatten_with_path(jax.eval_shape(tx.init, shapes))[0]:
        owner = owner_of(path, owners)
        if owner is not None and owner in cut and x.dtype.itemsize < 4:
            where, shape = jax.tree_util.keystr(owner), np.shape(owners[owner])
            raise ValueError(
                f"params{where}: expected parts of whole blocks of {BLOCK} along the last axis, "
                f"since its state has {x.dtype}; got {cut[owner].shard_shape(shape)} of {shape} "
                f"by {cut[owner].spec}"
            )
