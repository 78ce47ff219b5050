"""What a compiled program launches, read off its entry computation."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"\b(pred|(?:bf|[fsu])\d+)\[([\d,]*)\]")
_NOT_LAUNCHED = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}
_COLLECTIVES = ("all-", "reduce-scatter", "collective-", "ragged-all-to-all")
_STEP = "jadam_step"
_LEAVES_IN_LAUNCH = 256


class Launch(NamedTuple):
    """An instruction that runs on the device.

    Attributes:
        kind: of instruction: "fusion", "copy", "custom-call".
        target: of a custom call, else empty.
        read: bytes of its operands.
        written: bytes of its results.
        kernels: how many the device starts for it.
    """

    kind: str
    target: str
    read: int
    written: int
    kernels: int

    @property
    def is_of_arrays(self) -> bool:
        """Whether it touches more than scalars and the few numbers of a step."""
        return self.read + self.written > 1024

    @property
    def is_collective(self) -> bool:
        return self.kind.startswith(_COLLECTIVES)


def launches(text: str) -> Iterator[Launch]:
    """Those of the entry computation of a compiled program's text, in their order."""
    sizes: dict[str, int] = {}
    for line in text.split("\nENTRY ", 1)[1].splitlines()[1:]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, results, kind, rest = found.groups()
        sizes[name] = sum(_bytes(*array) for array in _ARRAY.findall(results))
        if kind in _NOT_LAUNCHED or kind.endswith("-done"):
            continue
        operands = re.findall(r"%[\w.\-]+", rest.split("), ", 1)[0])
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        yield Launch(
            kind,
            target[1] if target else "",
            sum(sizes.get(operand, 0) for operand in operands),
            sizes[name],
            _kernels_of_step(results, rest) if target and target[1] == _STEP else 1,
        )


def aliased(text: str) -> int:
    """How many results take the place of an argument."""
    header = text.split("\n", 1)[0]
    return len(re.findall(r"\(\d+, {[\d, ]*}, (?:may|must)-alias\)", header))


def _bytes(dtype: str, shape: str) -> int:
    size = math.prod(int(n) for n in shape.split(",") if n)
    return size * (1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8)


def _kernels_of_step(results: str, attributes: str) -> int:
    """How many kernels a call of jadam's library for GPUs launches.

    It has one for float32 alone, for other floats, for codes, and two for weights of 16 bits; a
    launch takes 256 leaves of one of them. A leaf's results are the parameter, m, v and, with
    compensated weights, a residual.
    """
    dtypes = iter(dtype for dtype, _ in _ARRAY.findall(results))
    leaves: dict[tuple[bool, str], int] = {}
    for weights in _attribute("weights", attributes, _attribute_size("salts", attributes)):
        p, m, v = (next(dtypes) for _ in range(3))
        if weights in (1, 2):
            next(dtypes)
        floats = "float32" if (p, m, v) == ("f32",) * 3 else "floats"
        kernel = (weights > 0, "codes" if m == "u16" else "floats" if weights else floats)
        leaves[kernel] = leaves.get(kernel, 0) + 1
    return sum(math.ceil(n / _LEAVES_IN_LAUNCH) for n in leaves.values())


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
