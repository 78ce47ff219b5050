"""A state in a safetensors file: plain named arrays, for programs without Orbax."""

import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from jadam._search import placed
from jadam._types import PyTree


def _named(argument: str, tree: PyTree) -> dict[str, Any]:
    """The leaves by the names that they have in a file, `0.mu.dense.kernel`."""
    leaves: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name, where = (
            jax.tree_util.keystr(path, simple=True, separator="."),
            jax.tree_util.keystr(path),
        )
        if name in leaves:
            raise ValueError(
                f"{argument}{paths[name]} and {argument}{where}: both are named {name!r}"
            )
        leaves[name], paths[name] = leaf, where
    return leaves


def _host(where: str, leaf: Any) -> Shaped[np.ndarray, "*shape"]:
    """The leaf as a NumPy array of contiguous memory, which safetensors does not check for."""
    try:
        return np.asarray(leaf, order="C")
    except Exception as error:
        raise TypeError(f"{where}: expected an array that this process holds; {error}") from error


def _seal(array: Shaped[np.ndarray, "*shape"]) -> str:
    """What the header says of an array beside its shape: safetensors has no checksum."""
    return f"{array.dtype} crc32 {zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"


def to_safetensors(path: str | os.PathLike[str], state: PyTree) -> None:
    """Writes a state, or any tree of arrays, to a safetensors file, bit for bit.

    Each leaf is an array of the file, named by its path: `0.mu.dense.kernel`. The header has a
    checksum of each. The file appears whole or not at all. Needs the package safetensors.

    Args:
        path: the file, which is replaced if it exists.
        state: arrays of any dtype that safetensors has: also bfloat16, float8 and complex64, but
            not complex128.

    Raises:
        TypeError: a leaf is no array, or lies on devices of other processes (use Orbax there).
        ValueError: safetensors does not have a leaf's dtype, or two leaves have one name.
        OSError: the file cannot be written.

    >>> import jax, jax.numpy as jnp, jadam, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.safetensors"
    >>> tx = jadam.adam(1e-3)
    >>> params = {"w": jnp.ones(3)}
    >>> jadam.migrate.to_safetensors(path, tx.init(params))
    >>> state = jadam.migrate.from_safetensors(path, jax.eval_shape(tx.init, params))
    >>> state[0].mu["w"].tolist()
    [0.0, 0.0, 0.0]
    """
    import safetensors
    import safetensors.numpy

    arrays = {name: _host(f"state: {name}", x) for name, x in _named("state", state).items()}
    for name, array in arrays.items():
        try:
            safetensors.numpy.save({name: array[..., :0] if array.ndim else array})
        except safetensors.SafetensorError as error:
            raise ValueError(f"state: {name}: {error}") from None
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.numpy.save_file(
            arrays, unfinished, metadata={name: _seal(x) for name, x in arrays.items()}
        )
        unfinished.replace(path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def from_safetensors(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """The state that `to_safetensors` wrote, in the tree of `like`.

    Args:
        path: the file.
        like: what the file must hold: the state that `tx.init` makes, or `jax.eval_shape` of it.
            Arrays go to its devices.

    Raises:
        ValueError: the file is truncated or changed, or a name, shape or dtype differs from that
            of `like`.
        OSError: there is no such file.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            seals = file.metadata() or {}
        found = dict(safetensors.deserialize(Path(path).read_bytes()))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file; {error}") from error

    expected = _named("like", like)
    for name in expected:
        if name not in found:
            raise ValueError(f"{path}: {name} is missing: like has it")
    for name in found:
        if name not in expected:
            raise ValueError(f"{path}: {name} is not expected: like does not have it")

    def array(name: str, leaf: Any) -> jax.Array:
        dtype, shape, where = np.dtype(leaf.dtype), tuple(found[name]["shape"]), f"{path}: {name}"
        written, _, _ = seals.get(name, "an array without checksum").partition(" crc32 ")
        if written != str(dtype):
            raise ValueError(f"{where}: expected {dtype} of like, got {written}")
        if shape != np.shape(leaf):
            raise ValueError(f"{where}: expected shape {np.shape(leaf)} of like, got {shape}")
        x = np.frombuffer(found[name]["data"], dtype).reshape(shape)
        if _seal(x) != seals[name]:
            raise ValueError(
                f"{where}: expected {seals[name]}, got {_seal(x)}: the file was changed"
            )
        return placed(x, leaf)

    leaves = [array(name, leaf) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
