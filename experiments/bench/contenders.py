"""Who is timed: jadam, optax, flashoptim-jax and torch, each with the same arithmetic to do.

AdamW with the paper's b1, b2 and eps; float32 where the name says nothing else. Arrays that a
training program would donate are donated. One call is one step on given gradients:

- step: `tx.step(grads, state, params)`, jadam's fused step.
- update: `tx.update` and `optax.apply_updates` in one jit.
- XLA: the step in XLA's operations, without jadam's kernel.
- avx2, baseline: the same step by an instruction set that the processor has beside its best, in a
  process of its own where it is forced on the kernel (JADAM_INSTRUCTION_SET) and on XLA alike.
- buffers alone: a call that takes and returns a step's arrays, donated, and computes nothing.
- in a scan: 20 steps in one `jax.lax.scan`, the time of one.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jadam
from experiments.bench import limit, program
from experiments.bench.trials import Trial, cores
from experiments.bench.workloads import Shapes
from jadam._kernels import native

OPTIONS = {"learning_rate": 1e-3, "weight_decay": 0.1}
SCANNED = 20

Arrays = list[jax.Array]
Step = Callable[[Arrays, Any, Arrays], tuple[Any, ...]]
"""A step: from parameters, state and gradients to the next parameters and state."""


def _normal(shapes: Shapes, seed: int) -> Iterator[np.ndarray]:
    """A million normal numbers, repeated: to draw more would take longer than the timing."""
    drawn = np.random.default_rng(seed).standard_normal(2**20, np.float32)
    return (np.resize(drawn, shape) for shape in shapes)


def _trial(
    step: Step,
    init: Callable[[Arrays], Any],
    shapes: Shapes,
    *,
    dtype: Any = jnp.float32,
    donate: tuple[int, ...] = (0, 1),
    scanned: int = 1,
) -> Trial:
    """A jitted step at work."""
    params, grads = ([jnp.array(x, dtype) for x in _normal(shapes, seed)] for seed in (0, 1))
    jitted = jax.jit(step, donate_argnums=donate)
    held = [params, init(params)]
    figures = program.figures(jitted, *held, grads)

    def run() -> list[Any]:
        held[:] = jitted(*held, grads)
        return held

    return Trial(run, jax.block_until_ready, scanned, figures, jitted._cache_size)


def _step(tx: Any, shapes: Shapes, **options: Any) -> Trial:
    def step(params: Arrays, state: Any, grads: Arrays) -> tuple[Any, ...]:
        return tx.step(grads, state, params)

    return _trial(step, tx.init, shapes, **options)


def _update(tx: Any, shapes: Shapes, **options: Any) -> Trial:
    def step(params: Arrays, state: Any, grads: Arrays) -> tuple[Any, ...]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return _trial(step, tx.init, shapes, **options)


def _scan(tx: Any, shapes: Shapes, step: Step) -> Trial:
    def steps(params: Arrays, state: Any, grads: Arrays) -> tuple[Any, ...]:
        def body(carry: tuple[Any, ...], _: None) -> tuple[Any, None]:
            return step(*carry, grads), None

        return jax.lax.scan(body, (params, state), None, SCANNED)[0]

    return _trial(steps, tx.init, shapes, scanned=SCANNED)


def _jadam(shapes: Shapes, kernel: Any = "auto", **options: Any) -> Trial:
    return _step(jadam.adamw(**OPTIONS, kernel=kernel, **options), shapes)


def _jadam_update(shapes: Shapes, kernel: Any = "auto") -> Trial:
    return _update(jadam.adamw(**OPTIONS, kernel=kernel), shapes)


def _jadam_packed(shapes: Shapes) -> Trial:
    return _update(optax.flatten(jadam.adamw(**OPTIONS)), shapes)


def _jadam_scan(shapes: Shapes) -> Trial:
    tx = jadam.adamw(**OPTIONS)
    return _scan(tx, shapes, lambda params, state, grads: tx.step(grads, state, params))


def _compensated(shapes: Shapes, kernel: Any = "auto", **options: Any) -> Trial:
    tx = jadam.compensated_weights(jadam.adamw(**OPTIONS, kernel=kernel, **options))
    return _step(tx, shapes, dtype=jnp.bfloat16)


def _stochastic(shapes: Shapes, **options: Any) -> Trial:
    tx = jadam.stochastic_rounding(jadam.adamw(**OPTIONS, **options))
    return _step(tx, shapes, dtype=jnp.bfloat16)


def _optax(shapes: Shapes, donate: tuple[int, ...] = (0, 1)) -> Trial:
    return _update(optax.adamw(**OPTIONS), shapes, donate=donate)


def _optax_scan(shapes: Shapes) -> Trial:
    tx = optax.adamw(**OPTIONS)

    def step(params: Arrays, state: Any, grads: Arrays) -> tuple[Any, ...]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return _scan(tx, shapes, step)


def _buffers(shapes: Shapes) -> Trial:
    def nothing(params: Arrays, state: Any, grads: Arrays) -> tuple[Any, ...]:
        return jax.lax.optimization_barrier((params, state, grads))[:2]

    return _trial(nothing, jadam.adamw(**OPTIONS).init, shapes)


def _flashoptim_jax(shapes: Shapes, dtype: Any = jnp.float32) -> Trial:
    from flashoptim_jax import flash_adamw

    # Its fused kernel is for GPUs; float32 parameters need no residual.
    bits, fused = 24 if dtype == jnp.bfloat16 else None, jax.default_backend() == "gpu"
    tx: Any = flash_adamw(**OPTIONS, master_weight_bits=bits, fused=fused)
    return _trial(tx.step, tx.init, shapes, dtype=dtype)


def _torch(shapes: Shapes, make: Callable[[Any, list[Any]], Any], dtype: str = "float32") -> Trial:
    """An optimizer of torch's, on the device that JAX uses: on another it could not be compared."""
    import torch

    torch.set_num_threads(cores())
    device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
    params, grads = (
        [torch.tensor(x, device=device, dtype=getattr(torch, dtype)) for x in _normal(shapes, seed)]
        for seed in (0, 1)
    )
    for p, g in zip(params, grads, strict=True):
        p.requires_grad_().grad = g
    optimizer = make(torch, params)
    if device == "cpu":
        return Trial(optimizer.step)
    return Trial(optimizer.step, wait=lambda _: torch.cuda.synchronize())


def _torch_adamw(shapes: Shapes, **kind: bool) -> Trial:
    def make(torch: Any, params: list[Any]) -> Any:
        return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, **kind)

    return _torch(shapes, make)


def _torch_peer(shapes: Shapes, module: str, name: str, dtype: str = "float32") -> Trial:
    def make(_: Any, params: list[Any]) -> Any:
        optimizer = getattr(importlib.import_module(module), name)
        return optimizer(params, lr=1e-3, weight_decay=0.1)

    return _torch(shapes, make, dtype)


def instruction_sets() -> tuple[str, ...]:
    """Those that jadam's kernel and this processor have, the best first."""
    return native.library().available


@dataclass(frozen=True)
class Contender:
    """A row of the tables.

    Attributes:
        name: as the tables show it.
        process: the runtime whose threads it uses; contenders of one process share its threads.
            "jax avx2" is a JAX whose kernel is that of AVX2.
        make: its arrays and its step for given shapes.
        bytes: the most that it holds for a parameter, temporaries included.
        module: what must be installed.
        where: backends that it runs on.
        many_leaves: for hundreds of leaves and more.
        few_leaves: for one leaf alone.
    """

    name: str
    process: str
    make: Callable[[Shapes], Trial]
    bytes: int
    module: str = "jadam"
    where: tuple[str, ...] = ("cpu", "gpu", "tpu")
    many_leaves: bool = False
    few_leaves: bool = False

    @property
    def instruction_set(self) -> str:
        """That which is forced; empty where nothing is."""
        return self.process.partition("jax ")[2]

    def missing(self, backend: str) -> str | None:
        """Why it cannot be timed, if it cannot."""
        if backend not in self.where:
            return f"not on a {backend.upper()}"
        if self.instruction_set and self.instruction_set not in instruction_sets()[1:]:
            return "not beside this processor's best"
        if importlib.util.find_spec(self.module) is None:
            return "not installed"
        return None


CPU_GPU, CPU, GPU = ("cpu", "gpu"), ("cpu",), ("gpu",)
_8_BITS = {"mu_dtype": "int8", "nu_dtype": "uint8"}
_4_BITS = {"mu_dtype": "int4", "nu_dtype": "uint4"}
_16_BITS = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
_BF16 = "bfloat16"

LIMIT = Contender("limit", "limit", limit.step, 16)
COPY = Contender("copy", "limit", limit.copy, 16)
TORCH_FUSED = Contender(
    "torch fused", "torch", functools.partial(_torch_adamw, fused=True), 16, "torch", CPU_GPU
)
JADAM = Contender("jadam step", "jax", _jadam, 20)
JADAM_UPDATE = Contender("jadam update", "jax", _jadam_update, 22)
JADAM_16 = Contender("jadam bf16 moments", "jax", functools.partial(_jadam, **_16_BITS), 19)
JADAM_8 = Contender("jadam 8-bit moments", "jax", functools.partial(_jadam, **_8_BITS), 16)
JADAM_4 = Contender("jadam 4-bit moments", "jax", functools.partial(_jadam, **_4_BITS), 15)
COMPENSATED = Contender("jadam compensated bf16 weights", "jax", _compensated, 18)
COMPENSATED_8 = Contender(
    "jadam compensated, 8-bit moments", "jax", functools.partial(_compensated, **_8_BITS), 12
)
STOCHASTIC_4 = Contender(
    "jadam stochastic, 4-bit moments", "jax", functools.partial(_stochastic, **_4_BITS), 10
)
XLA = Contender("jadam step, XLA", "jax", functools.partial(_jadam, kernel="xla"), 20, where=CPU)
XLA_16 = Contender(
    "jadam bf16 moments, XLA",
    "jax",
    functools.partial(_jadam, kernel="xla", **_16_BITS),
    20,
    where=CPU,
    few_leaves=True,
)
FORCED = tuple(
    dataclasses.replace(
        contender,
        name=f"{contender.name}, {name}",
        process=f"jax {name}",
        where=CPU,
        few_leaves=True,
    )
    for name in ("avx2", "baseline")
    for contender in (JADAM, XLA, JADAM_16, XLA_16, JADAM_8, COMPENSATED_8)
)
JADAM_SCAN = Contender("jadam step, in a scan", "jax", _jadam_scan, 24, many_leaves=True)
BUFFERS = Contender("buffers alone", "jax", _buffers, 16)
JADAM_PACKED = Contender(
    "jadam update in optax.flatten", "jax", _jadam_packed, 40, many_leaves=True
)
OPTAX = Contender("optax", "jax", _optax, 20)
FLASHOPTIM_JAX = Contender(
    "flashoptim-jax 8-bit", "jax", _flashoptim_jax, 36, "flashoptim_jax", CPU_GPU
)
REFERENCES = (LIMIT, TORCH_FUSED)
"""In every round."""
CONTENDERS = (
    LIMIT,
    TORCH_FUSED,
    BUFFERS,
    JADAM,
    JADAM_UPDATE,
    OPTAX,
    XLA,
    XLA_16,
    Contender(
        "jadam update, native",
        "jax",
        functools.partial(_jadam_update, kernel="native"),
        26,
        where=CPU,
    ),
    Contender("optax, not donated", "jax", functools.partial(_optax, donate=()), 28),
    JADAM_16,
    JADAM_8,
    JADAM_4,
    COMPENSATED,
    COMPENSATED_8,
    STOCHASTIC_4,
    *FORCED,
    FLASHOPTIM_JAX,
    Contender(
        "flashoptim-jax 8-bit, bf16 weights",
        "jax",
        functools.partial(_flashoptim_jax, dtype=jnp.bfloat16),
        32,
        "flashoptim_jax",
        CPU_GPU,
    ),
    JADAM_PACKED,
    JADAM_SCAN,
    Contender("optax, in a scan", "jax", _optax_scan, 24, many_leaves=True),
    Contender(
        "torch foreach",
        "torch",
        functools.partial(_torch_adamw, foreach=True),
        20,
        "torch",
        CPU_GPU,
    ),
    Contender(
        "torch loop", "torch", functools.partial(_torch_adamw, foreach=False), 24, "torch", CPU_GPU
    ),
    Contender(
        "flashoptim 8-bit, bf16 weights (torch)",
        "torch",
        functools.partial(_torch_peer, module="flashoptim", name="FlashAdamW", dtype=_BF16),
        16,
        "flashoptim",
        GPU,
    ),
    Contender(
        "bitsandbytes 8-bit (torch)",
        "torch",
        functools.partial(_torch_peer, module="bitsandbytes.optim", name="AdamW8bit"),
        16,
        "bitsandbytes",
        CPU_GPU,
    ),
    Contender(
        "torchao 8-bit (torch)",
        "torch",
        functools.partial(_torch_peer, module="torchao.optim", name="AdamW8bit"),
        16,
        "torchao",
        GPU,
    ),
    COPY,
)
