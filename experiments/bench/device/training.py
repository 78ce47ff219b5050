"""A GPT trained for a while, in float32 by optax and in 7 bytes a parameter by jadam.

The model has GPT-2 small's depth and width and reads bytes; matrix products are in bfloat16 and add
up in float32. Both settings start from the same numbers and see the same batches in the same order,
each for the same seconds, of which the first steps, with compilation, are not counted.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jadam
from experiments.bench.ahead.programs import BITS_8, Program, fused, in_two
from experiments.bench.device.in_jax import about
from experiments.bench.device.rows import ABOUT, Order, attempt, end, order, say
from experiments.common.gpt import GPT, Shape, is_matrix, loss_fn
from experiments.common.text import load

SHAPE, BATCH = Shape(layers=12, width=768, heads=12, context=1024), 8
TINY_SHAPE, TINY_BATCH = Shape(layers=1, width=32, heads=2, context=32), 4
PRODUCTS = "BF16_BF16_F32"
RATE, WARMUP, DECAY, CLIP = 6e-4, 50, 0.1, 1.0
EVERY = 10
"""Steps between two looks at the losses and the clock."""
WARM = 2 * EVERY
"""Steps before tokens are counted."""
HELD_OUT = 10
"""Batches of text that is not trained on."""
SAY_SECONDS = 3.0
"""Between two rows of a training that goes on."""
RESERVE_SECONDS = 4.0
"""What is left of the time for the evaluation."""


def _adamw(make: Any, **options: Any) -> Any:
    schedule = optax.warmup_constant_schedule(0.0, RATE, WARMUP)
    return make(schedule, weight_decay=DECAY, mask=is_matrix, **options)


SETTINGS = {
    "optax float32": lambda: in_two(_adamw(optax.adamw)),
    "jadam 7 bytes": lambda: fused(
        jadam.compensated_weights(_adamw(jadam.adamw, **BITS_8)), jnp.bfloat16
    ),
}


def trained(name: str, given: Order) -> dict[str, Any]:
    """The losses of all steps, tokens a second, and the loss of other text."""
    shape, batch_size = (TINY_SHAPE, TINY_BATCH) if given.tiny else (SHAPE, BATCH)
    text = load(Path(given.cache))
    program: Program = SETTINGS[name]()
    graph, params = nnx.split(GPT(shape, rngs=nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda p: p.astype(program.dtype), nnx.to_pure_dict(params))
    state = program.tx.init(params)
    clip = optax.clip_by_global_norm(CLIP)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(PRODUCTS):
            return loss_fn(nnx.merge(graph, params), batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        grads, _ = clip.update(grads, optax.EmptyState())
        return *program.step(params, state, grads), value

    def held_out() -> float:
        rng = np.random.default_rng(1)
        batches = (pieces(text.validation, rng, batch_size, shape.context) for _ in range(HELD_OUT))
        return float(np.mean([evaluate(params, batch) for batch in batches]))

    evaluate = jax.jit(loss)
    before = held_out()  # which compiles it, before the clock runs
    rng = np.random.default_rng(0)
    tokens = batch_size * shape.context
    losses: list[float] = []
    row: dict[str, Any] = {
        "setting": name,
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "tokens_in_a_step": tokens,
        "text": text.origin,
        "first_validation_loss": before,
    }
    start = time.perf_counter()
    counted = said = start
    while True:
        values = []
        for _ in range(EVERY):
            batch = pieces(text.train, rng, batch_size, shape.context)
            params, state, value = step(params, state, batch)
            values.append(value)
        losses += [float(value) for value in values]
        now = time.perf_counter()
        if len(losses) == EVERY:
            row["first_steps_s"] = now - start
        if len(losses) <= WARM:
            counted = now
        else:
            row["tokens_per_second"] = (len(losses) - WARM) * tokens / (now - counted)
        if now - said >= SAY_SECONDS:
            say(name, {**row, "losses": losses})
            said = now
        done = len(losses) > WARM and now - counted >= given.seconds
        if done or given.left < RESERVE_SECONDS:
            break
    stats = jax.devices()[0].memory_stats() or {}
    row |= {"losses": losses, "peak": stats.get("peak_bytes_in_use")}
    say(name, row)
    return {**row, "validation_loss": held_out()}


def pieces(text: np.ndarray, rng: np.random.Generator, number: int, context: int) -> jax.Array:
    """Some pieces of a text, from random places."""
    window = np.arange(context + 1)
    starts = rng.integers(0, len(text) - len(window), (number, 1))
    return jnp.asarray(text[starts + window], jnp.int32)


def main(given: Order) -> None:
    """One setting in a process."""
    (name,) = given.names
    say(ABOUT, about())
    attempt(name, lambda: trained(name, given), given, setting=name)


if __name__ == "__main__":
    main(order())
    end()
