"""A state in a safetensors file: plain named arrays, for programs without Orbax."""

import contextlib
import json
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

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
    """The leaf as a NumPy array of contiguous memory in the machine's order of bytes.

    safetensors checks for neither.
    """
    try:
        array = np.asarray(leaf, order="C")
    except Exception as error:
        raise TypeError(f"{where}: expected an array that this process holds; {error}") from error
    if array.dtype.kind in "OSU":
        raise TypeError(f"{where}: expected an array of numbers, got {leaf!r}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _path(value: Any) -> Path:
    """The argument `path`, which a state in its place is not."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"path: expected a str or os.PathLike, got {type(value).__name__}")
    return Path(value)


def _seal(array: Shaped[np.ndarray, "*shape"]) -> str:
    """What the header says of an array beside its shape: safetensors has no checksum."""
    return f"{array.dtype} crc32 {zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"


# A writer that is killed leaves its folder behind. The next one finds it by its name, and tells it
# from those of living writers by a lock, which ends with its process.
_PREFIX, _SUFFIX = ".jadam-", ".unfinished"


def _locked(file: TextIO) -> bool | None:
    """Whether this process holds the file's lock now, or None where there are no such locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # of a file system without them
        return None
    return True


def _sweep(parent: Path) -> None:
    """Removes what killed writers left in a folder."""
    for unfinished in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError), (unfinished / "lock").open("a") as lock:
            if _locked(lock):
                shutil.rmtree(unfinished)


def _own_folder(parent: Path) -> tuple[Path, TextIO]:
    """A new folder in another, and its lock, with which it is no other writer's to remove."""
    while True:
        folder = Path(tempfile.mkdtemp(_SUFFIX, _PREFIX, parent))
        try:
            lock = (folder / "lock").open("a")
        except FileNotFoundError:
            continue  # swept before it was locked
        if _locked(lock) is not False and (folder / "lock").exists():
            return folder, lock
        lock.close()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives a place to write what then becomes the file, with the mode of the old or a new one.

    The place has a folder of its own, since safetensors writes under yet another name.
    """
    _sweep(path.parent)
    folder, lock = _own_folder(path.parent)
    try:
        with lock:
            yield folder / "new"
            old_or_new = path.stat() if path.exists() else os.fstat(lock.fileno())
            (folder / "new").chmod(stat.S_IMODE(old_or_new.st_mode))
            (folder / "new").replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def to_safetensors(path: str | os.PathLike[str], state: PyTree) -> None:
    """Writes a state, or any tree of arrays, to a safetensors file, bit for bit.

    Each leaf is an array of the file, named by its path: `0.mu.dense.kernel`. The header has a
    checksum of each. The file appears whole or not at all; it is written in a folder
    `.jadam-*.unfinished` beside it, which the next call removes if the process is killed. Needs
    the package safetensors.

    Args:
        path: the file, which is replaced if it exists, and keeps its mode. Of a symbolic link,
            what it points to.
        state: arrays of any dtype that safetensors has: also bfloat16, float8 and complex64, but
            not complex128.

    Raises:
        TypeError: a leaf is no array of numbers, or lies on devices of other processes (use Orbax
            there); or path is none.
        ValueError: safetensors does not have a leaf's dtype or its name, or two leaves have one
            name.
        OSError: the file cannot be written, or is none, but a folder or a device.

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

    path = Path(os.path.realpath(_path(path)))
    arrays = {name: _host(f"state: {name}", x) for name, x in _named("state", state).items()}
    for name, array in arrays.items():
        try:
            safetensors.numpy.save({name: array[..., :0] if array.ndim else array})
        except safetensors.SafetensorError as error:
            raise ValueError(f"state: {name}: {error}") from None
    if "__metadata__" in arrays:
        raise ValueError(
            "state: expected leaves of other names than '__metadata__', which a safetensors file "
            "has for its own"
        )
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file to replace")
    seals = {name: _seal(x) for name, x in arrays.items()}
    with _replacing(path) as place:
        try:
            # Of empty metadata safetensors would write what it cannot read.
            safetensors.numpy.save_file(arrays, place, metadata=seals or None)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: {error}") from error


def from_safetensors(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """The state that `to_safetensors` wrote, in the tree of `like`.

    Args:
        path: the file.
        like: what the file must hold: the state that `tx.init` makes, or `jax.eval_shape` of it.
            Arrays go to its devices.

    Raises:
        TypeError: path is none.
        ValueError: the file is truncated or changed, or a name, shape or dtype differs from that
            of `like`.
        OSError: there is no such file.
    """
    import safetensors

    content = _path(path).read_bytes()  # once: another process may replace the file
    try:
        found = dict(safetensors.deserialize(content))
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file; {error}") from error
    seals = header.get("__metadata__", {})

    expected = _named("like", like)
    for name in expected:
        if name not in found:
            raise ValueError(f"{path}: {name} is missing: like has it")
    for name in found:
        if name not in expected:
            raise ValueError(f"{path}: {name} is not expected: like does not have it")

    def array(name: str, leaf: Any) -> jax.Array:
        dtype, where = np.dtype(leaf.dtype).newbyteorder("="), f"{path}: {name}"
        shape = tuple(found[name]["shape"])
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
