"""What a compiled program launches, read off its entry computation."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"\b(pred|(?:bf|[fsu])\d+)\[([\d,]*)\](\{[^}]*\})?")
_NOT_LAUNCHED = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}
_NOT_A_KERNEL = "ConcatBitcast"  # slices that lie beside each other on a TPU, as one array
_COLLECTIVES = ("all-", "reduce-scatter", "collective-", "ragged-all-to-all")
_STEP = "jadam_step"
LEAVES_IN_LAUNCH = 256
"""Of jadam's library for GPUs."""


class Launch(NamedTuple):
    """An instruction that runs on the device.

    Attributes:
        kind: of instruction: "fusion", "copy", "custom-call".
        target: of a custom call, else empty.
        read: bytes of its operands, as they lie in the device's memory, padding included.
        written: bytes of its results likewise. What a TPU keeps on the chip is in neither.
        touched: bytes of operands and results wherever they lie.
        kernels: how many the device starts for it.
    """

    kind: str
    target: str
    read: int
    written: int
    touched: int
    kernels: int

    @property
    def is_of_arrays(self) -> bool:
        """Whether it computes or copies more than scalars and the few numbers of a step.

        A TPU brings arrays to the chip and back beside its kernels.
        """
        beside = self.kind.endswith("-start") or self.target == _NOT_A_KERNEL
        return self.touched > 1024 and not beside

    @property
    def is_collective(self) -> bool:
        return self.kind.startswith(_COLLECTIVES)


def launches(text: str) -> Iterator[Launch]:
    """Those of the entry computation of a compiled program's text, in their order."""
    sizes: dict[str, tuple[int, int]] = {}
    for line in text.split("\nENTRY ", 1)[1].splitlines()[1:]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, results, kind, rest = found.groups()
        arrays = _ARRAY.findall(results)
        sizes[name] = _off_chip(arrays), sum(map(_bytes, arrays))
        if kind in _NOT_LAUNCHED or kind.endswith("-done"):
            continue
        operands = re.findall(r"%[\w.\-]+", rest.split("), ", 1)[0])
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        read, touched = np.sum([(0, 0), *(sizes.get(x, (0, 0)) for x in operands)], 0).tolist()
        written = sizes[name][0]
        if kind.endswith("-start"):
            # Between memory and chip: what lies on the chip, since only a slice may have moved.
            read, written = 0, sum(_bytes(x) for x in arrays if _is_on_chip(x) and x[1]) or 2 * read
        yield Launch(
            kind,
            target[1] if target else "",
            read,
            written,
            touched + sizes[name][1],
            _kernels_of_step(results, rest) if target and target[1] == _STEP else 1,
        )


def aliased(text: str) -> int:
    """How many results take the place of an argument."""
    header = text.split("\n", 1)[0]
    return len(re.findall(r"\(\d+, {[\d, ]*}, (?:may|must)-alias\)", header))


Array = tuple[str, str, str]
"""Dtype, shape and layout as the text has them: "f32", "8,128", "{1,0:T(8,128)S(1)}"."""


def _off_chip(arrays: list[Array]) -> int:
    return sum(_bytes(array) for array in arrays if not _is_on_chip(array))


def _is_on_chip(array: Array) -> bool:
    """Whether it lies in another memory than the device's large one, which has no number."""
    return "S(" in array[2]


def _bytes(array: Array) -> int:
    """In a TPU's tiles the last axes, in the order in which they lie, are padded to whole tiles."""
    dtype, shape, layout = array
    sizes = [int(n) for n in shape.split(",") if n]
    if (tiled := re.match(r"{([\d,]+):T\(([\d,]+)\)", layout)) and sizes:
        order, tile = ([int(n) for n in x.split(",")] for x in tiled.groups())
        for axis, n in zip(order, reversed(tile), strict=False):
            sizes[axis] = -(-sizes[axis] // n) * n
    return math.prod(sizes) * (1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8)


def _kernels_of_step(results: str, attributes: str) -> int:
    """How many kernels a call of jadam's library for GPUs launches.

    It has one for float32 alone, for other floats, for codes of 8 and of 4 bits, and three for
    weights of 16 bits; a launch takes 256 leaves of one of them. A leaf's results are the
    parameter, m, v and, with compensated weights, a residual.
    """
    dtypes = iter(dtype for dtype, *_ in _ARRAY.findall(results))
    leaves: dict[tuple[bool, str], int] = {}
    for weights in _attribute("weights", attributes, _attribute_size("salts", attributes)):
        p, m, v = (next(dtypes) for _ in range(3))
        if weights in (1, 2):
            next(dtypes)
        floats = "float32" if (p, m, v) == ("f32",) * 3 else "floats"
        kernel = (weights > 0, m if m in ("u16", "u8") else "floats" if weights else floats)
        leaves[kernel] = leaves.get(kernel, 0) + 1
    return sum(math.ceil(n / LEAVES_IN_LAUNCH) for n in leaves.values())


def _attribute_size(name: str, attributes: str) -> int:
    found = re.search(rf"{name} = [^:]* : tensor<(\d+)xi32>", attributes)
    assert found is not None, attributes
    return int(found[1])


def _attribute(name: str, attributes: str, size: int) -> list[int]:
    """The numbers of an attribute, which is written as one where all are equal."""
    found = re.search(rf"{name} = dense<\[?([\d, ]+)\]?>", attributes)
    assert found is not None, attributes
    numbers = [int(n) for n in found[1].split(",")]
    return np.broadcast_to(numbers, size).tolist()
