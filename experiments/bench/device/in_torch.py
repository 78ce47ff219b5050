"""Time and memory of PyTorch's optimizers, in a process without JAX.

`call` is by CUDA events around many steps in a row; `device` is one replay of a CUDA graph of a
step, in which Python takes no part. On a CPU it is the clock on the wall, and there is no graph.
"""

import functools
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from experiments.bench.device.rows import (
    REPEATS,
    Order,
    attempt,
    calls_in_a_turn,
    end,
    order,
    reason,
    say,
)
from experiments.bench.workloads import GPT2, IN_CACHE, ONE_LEAF, WORKLOADS, Shapes, Workload

COPIED = 4_000_000_000
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}


class Contender(NamedTuple):
    """An optimizer.

    Attributes:
        make: of parameters, and whether it will be captured in a graph.
        dtype: of parameters and gradients.
        module: what must be installed.
        timed_on: the names of its workloads; all where it is empty.
    """

    make: Callable[[list[torch.Tensor], bool], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32
    module: str = "torch"
    timed_on: tuple[str, ...] = ()


def _adamw(kind: str) -> Callable[[list[torch.Tensor], bool], torch.optim.Optimizer]:
    def make(params: list[torch.Tensor], captured: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, capturable=captured, **{kind: True}, **OPTIONS)

    return make


def _peer(module: str, name: str) -> Callable[[list[torch.Tensor], bool], torch.optim.Optimizer]:
    def make(params: list[torch.Tensor], captured: bool) -> torch.optim.Optimizer:
        del captured
        return getattr(importlib.import_module(module), name)(params, **OPTIONS)

    return make


FUSED = "torch fused float32"
LARGE = (ONE_LEAF.name, GPT2.name)
CONTENDERS = {
    FUSED: Contender(_adamw("fused")),
    "torch fused bf16": Contender(_adamw("fused"), torch.bfloat16),
    "torch foreach float32": Contender(_adamw("foreach")),
    "flashoptim 8-bit, bf16 weights": Contender(
        _peer("flashoptim", "FlashAdamW"), torch.bfloat16, "flashoptim", LARGE
    ),
    "bitsandbytes 8-bit": Contender(
        _peer("bitsandbytes.optim", "AdamW8bit"), torch.float32, "bitsandbytes", LARGE
    ),
    "torchao 8-bit": Contender(
        _peer("torchao.optim", "AdamW8bit"), torch.float32, "torchao", LARGE[:1]
    ),
}
TIMED = tuple(workload for workload in WORKLOADS if workload is not IN_CACHE)
TINY = (Workload("20 leaves of 64 x 64", ((64, 64),) * 20),)


def with_gradients(shapes: Shapes, dtype: torch.dtype) -> list[torch.Tensor]:
    """Parameters of normal numbers, each with its gradient."""
    torch.manual_seed(0)
    params = [torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def nbytes(x: Any) -> int:
    """Bytes of a tensor, or of the tensors that it is made of."""
    if hasattr(x, "__tensor_flatten__"):
        return sum(nbytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    # FlashOptim's own kind of tensor.
    return sum(map(nbytes, vars(x).values())) if hasattr(x, "__dict__") else 0


def held_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the gradients, and of what a step reads and writes: parameters and state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [x for p in params for x in optimizer.state[p].values()]
    return sum(nbytes(p.grad) for p in params), sum(map(nbytes, [*params, *state]))


def turns(run: Callable[[], Any]) -> list[float]:
    """Seconds of a call in each turn."""

    def turn(calls: int) -> float:
        if not ON_GPU:
            started = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - started) / calls
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop) / calls

    turn(2)
    calls = calls_in_a_turn(turn(1))
    return [turn(calls) for _ in range(REPEATS)]


def replayed(optimizer: torch.optim.Optimizer) -> list[float]:
    """Seconds of a step in a CUDA graph. The first steps, on a stream beside, make the state."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return turns(graph.replay)


def timed(contender: Contender, shapes: Shapes) -> dict[str, Any]:
    """Both times of a step."""
    parameters = sum(math.prod(shape) for shape in shapes)
    params = with_gradients(shapes, contender.dtype)
    optimizer = contender.make(params, False)
    optimizer.step()
    gradients, moved = held_bytes(optimizer)
    row = {"bytes": (gradients + 2 * moved) / parameters, "call": turns(optimizer.step)}
    if not ON_GPU:
        return row
    del optimizer
    try:
        return {**row, "device": replayed(contender.make(params, True))}
    except Exception as error:
        return {**row, "no_loop": reason(error)}


def copied(tiny: bool) -> dict[str, Any]:
    """Bytes a second, read and written, that a copy moves."""
    x = torch.randn(1_000_000 if tiny else COPIED // 4, device=DEVICE)
    y = torch.empty_like(x)
    return {"rates": [2 * nbytes(x) / s for s in turns(lambda: y.copy_(x))]}


def why_not(contender: Contender) -> str | None:
    """Why it cannot be timed, if it cannot."""
    if importlib.util.find_spec(contender.module) is None:
        return "not installed"
    return None if ON_GPU or contender.module == "torch" else "for GPUs"


def speed(given: Order) -> None:
    """The copy, then each workload; those that compile for long come last."""
    attempt("copy, torch", lambda: copied(given.tiny), given, framework="torch")
    workloads = TINY if given.tiny else TIMED
    for name, contender in CONTENDERS.items():
        for workload in workloads:
            if contender.timed_on and workload.name not in contender.timed_on:
                continue
            about = {
                "workload": workload.name,
                "contender": name,
                "framework": "torch",
                "parameters": workload.parameters,
                "leaves": len(workload.shapes),
            }
            key = f"{workload.name} / {name}"
            if (missing := why_not(contender)) is not None:
                say(key, {**about, "missing": missing})
                continue
            found = functools.partial(timed, contender, workload.shapes)
            attempt(key, found, given, **about)
            if ON_GPU:
                torch.cuda.empty_cache()


def peak(shapes: Shapes) -> dict[str, Any]:
    """Bytes before and at the peak of a step of the fused AdamW, with its state there."""
    optimizer = CONTENDERS[FUSED].make(with_gradients(shapes, torch.float32), False)
    optimizer.step()
    gradients, moved = held_bytes(optimizer)
    row = {
        "parameters": sum(math.prod(shape) for shape in shapes),
        "least": gradients + moved,
        "before": None,
        "peak": None,
    }
    if not ON_GPU:
        return row
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    return {**row, "before": before, "peak": torch.cuda.max_memory_allocated()}


def memory(given: Order) -> None:
    """The memory of a GPT-2 step."""
    shapes = TINY[0].shapes if given.tiny else GPT2.shapes
    attempt(FUSED, lambda: peak(shapes), given)


if __name__ == "__main__":
    {"speed": speed, "memory": memory}[sys.argv[1]](order())
    end()
