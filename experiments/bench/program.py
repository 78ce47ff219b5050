"""Figures of a compiled program: what XLA made of a step, and how long that took."""

import re
import time
from typing import Any

INSTRUCTIONS = ("fusion", "custom-call", "copy")


def figures(jitted: Any, *arguments: Any) -> dict[str, float]:
    """Seconds to trace, lower and compile; bytes; instructions of the optimized program.

    `accessed_bytes` is XLA's own estimate, which counts nothing inside a custom call; `copy` are
    whole arrays that XLA moves because it could not work in place.
    """
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    return {
        "lowering_seconds": middle - start,
        "compile_seconds": end - middle,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "accessed_bytes": (cost or {}).get("bytes accessed", 0.0),
        **{name: count(name, text) for name in INSTRUCTIONS},
    }


def count(instruction: str, text: str) -> int:
    """How many instructions of a kind a program's text has."""
    return len(re.findall(rf" {instruction}\(", text))
