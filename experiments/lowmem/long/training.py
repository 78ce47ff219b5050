"""A setting's training and its fine-tuning, several seeds at once, in chunks compiled once.

What a chunk is given are the numbers of its steps and their learning rates; so the same program
trains and fine-tunes. On a GPU a model of a million parameters is far too small to fill the device:
there the seeds are one program under `jax.vmap`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, UInt8

import jadam
from experiments.common.gpt import GPT, Shape, scanned
from experiments.common.text import Text
from experiments.lowmem.settings import (
    MOMENTS_8,
    REFERENCE,
    SETTINGS,
    Before,
    Build,
    Setting,
    adamw,
    in_dtype,
    stochastic,
)

from . import nearest

NEAREST = "8-bit moments to nearest"
STOCHASTIC = "bf16 weights, stochastic + 8-bit moments"
SLOWER = "float32, 0.8 of the learning rate"


def slower(build: Build) -> Build:
    """A control for codes of 4 bits, whose steps are shorter while the second moment changes."""

    def slowed(
        learning_rate: optax.ScalarOrSchedule, decay: float, before: Before
    ) -> optax.GradientTransformation:
        assert callable(learning_rate)
        return build(lambda count: 0.8 * learning_rate(count), decay, before)

    return slowed


LONG = {
    REFERENCE: SETTINGS[REFERENCE],
    "bf16 weights, compensated + 8-bit moments": SETTINGS[
        "bf16 weights, compensated + 8-bit moments"
    ],
    "8-bit moments": SETTINGS["8-bit moments"],
    NEAREST: Setting("float32", nearest.adamw),
    "bf16 weights, plain": SETTINGS["bf16 weights, plain"],
    "flashoptim-jax": SETTINGS["flashoptim-jax"],
    "optax.adamw float32": SETTINGS["optax.adamw float32"],
    "bf16 moments": SETTINGS["bf16 moments"],
    STOCHASTIC: Setting("bfloat16", stochastic(adamw(**MOMENTS_8))),
    **{name: SETTINGS[name] for name in SETTINGS if "4-bit" in name},
    "bf16 weights, compensated": SETTINGS["bf16 weights, compensated"],
    "bf16 weights, stochastic": SETTINGS["bf16 weights, stochastic"],
    SLOWER: Setting("float32", slower(adamw())),
}
"""In the order of their importance: the time may end before the last."""
# XLA may leave out a rounding to bfloat16 and back. Then a residual that is the difference between
# both is 0; flashoptim-jax's never changed on a GPU.
AS_WRITTEN = {"xla_allow_excess_precision": False}
EVERY = 50
"""Steps whose mean is a point of a curve."""


@dataclass(frozen=True)
class Config:
    """What all runs have in common."""

    steps: int = 4000
    warmup: int = 200
    chunk: int = 500
    """Steps of a compiled program, after which the validation loss is taken."""
    batch_size: int = 16
    learning_rate: float = 2e-3
    last_share: float = 0.1
    """The last learning rate beside the highest; a cosine leads there."""
    weight_decay: float = 0.1
    clip: float = 1.0
    fine_steps: int = 500
    fine_share: float = 0.01
    """The constant learning rate of fine-tuning beside the highest one of training."""
    shape: Shape = field(default_factory=lambda: Shape(layers=5, width=128, heads=4, context=128))

    def __post_init__(self) -> None:
        for name in ("steps", "fine_steps"):
            if (steps := getattr(self, name)) % self.chunk:
                raise ValueError(f"{name}: expected a multiple of {self.chunk}, got {steps}")
        if self.chunk % EVERY:
            raise ValueError(f"chunk: expected a multiple of {EVERY}, got {self.chunk}")

    @property
    def rates(self) -> Float[np.ndarray, " steps"]:
        """The learning rate of each step of training."""
        last = self.learning_rate * self.last_share
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup, self.steps, last
        )
        return np.asarray(schedule(np.arange(self.steps)), np.float32)

    @property
    def fine_rates(self) -> Float[np.ndarray, " steps"]:
        """The learning rate of each step of fine-tuning."""
        return np.full(self.fine_steps, self.learning_rate * self.fine_share, np.float32)


class Done(NamedTuple):
    """What some chunks did, for each seed.

    Attributes:
        loss: of each step.
        moved: of each step, the share of the parameters that are other numbers after it.
        moved_with_rest: the same, where what the state keeps of a parameter counts too.
        validation: the loss of the text that is not trained on, before the first chunk and after
            each.
    """

    loss: Float[np.ndarray, "seeds steps"]
    moved: Float[np.ndarray, "seeds steps"]
    moved_with_rest: Float[np.ndarray, "seeds steps"]
    validation: Float[np.ndarray, "seeds chunks+1"]


class Task:
    """The model and the text, which all settings share; parameters have a first axis of seeds."""

    def __init__(self, config: Config, text: Text) -> None:
        self.config = config
        self.text: UInt8[Array, " n"] = jnp.asarray(text.train)
        context = config.shape.context
        self.window = np.arange(context + 1)
        starts = np.arange(0, len(text.validation) - context, context)
        starts = starts[: len(starts) // config.batch_size * config.batch_size]
        pieces = text.validation[starts[:, None] + self.window]
        self.validation = jnp.asarray(pieces.reshape(-1, config.batch_size, context + 1))
        _, self.loss = scanned(GPT(config.shape, rngs=nnx.Rngs(0)))

    def first_params(self, seeds: Sequence[int]) -> PyTree:
        """float32, the same for every setting."""
        models = [scanned(GPT(self.config.shape, rngs=nnx.Rngs(seed)))[0] for seed in seeds]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    @cached_property
    def evaluate(self) -> Any:
        """The jitted function from parameters to the loss of the validation text, for each seed."""

        def one(params: PyTree) -> Float[Array, ""]:
            batches = self.validation
            return lax.map(lambda x: self.loss(params, x.astype(jnp.int32)), batches).mean()

        return jax.jit(lambda params: over_seeds(one, params))


def over_seeds(one: Any, *arrays: PyTree) -> PyTree:
    """`one` for each seed: one seed alone has what a kernel of jadam's takes, without an axis."""
    if jax.tree.leaves(arrays)[0].shape[0] > 1:
        return jax.vmap(one)(*arrays)
    return jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], arrays)))


class Program:
    """A setting's compiled chunk for a number of seeds."""

    def __init__(self, setting: str, task: Task, seeds: int) -> None:
        self.setting, self.task = LONG[setting], task
        given = jax.eval_shape(lambda: (task.first_params(range(seeds)), keys_of(range(seeds))))
        self.start = jax.jit(self._start).lower(*given).compile(AS_WRITTEN)
        params, state = jax.eval_shape(self._start, *given)
        numbers, rates = (
            jax.ShapeDtypeStruct((task.config.chunk,), x) for x in (jnp.int32, jnp.float32)
        )
        chunk = jax.jit(self._chunk, donate_argnums=(0, 1))
        self.chunk = chunk.lower(params, state, given[1], task.text, numbers, rates).compile(
            AS_WRITTEN
        )

    def optimizer(self, rate: Float[Array, ""] | float) -> optax.GradientTransformation:
        """With a learning rate that is given from outside, whatever its own count says."""
        config = self.task.config
        clip = optax.clip_by_global_norm(config.clip)
        return self.setting.build(lambda count: rate, config.weight_decay, clip)

    def _start(self, params: PyTree, keys: Array) -> tuple[PyTree, PyTree]:
        def one(params: PyTree, key: Array) -> tuple[PyTree, optax.OptState]:
            params = in_dtype(params, self.setting.param_dtype)
            state = self.optimizer(0.0).init(params)
            if isinstance(state, jadam.StochasticRoundingState):
                state = state._replace(key=jax.random.bits(key, (2,), jnp.uint32))
            return params, state

        return over_seeds(one, params, keys)

    def _chunk(
        self,
        params: PyTree,
        state: optax.OptState,
        keys: Array,
        text: UInt8[Array, " n"],
        numbers: Int[Array, " steps"],
        rates: Float[Array, " steps"],
    ) -> tuple[PyTree, optax.OptState, tuple[Array, Array, Array]]:
        task, window = self.task, self.task.window

        def step(key: Array, carry: tuple, x: tuple) -> tuple:
            (params, state), (number, rate) = carry, x
            places = (task.config.batch_size, 1)
            starts = jax.random.randint(
                jax.random.fold_in(key, number), places, 0, len(text) - len(window)
            )
            batch = text[starts + window].astype(jnp.int32)
            value, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, next_state = self.optimizer(rate).update(grads, state, params)
            next_params = optax.apply_updates(params, updates)
            before, after = (params, rest(state)), (next_params, rest(next_state))
            moved = share_moved(before[:1], after[:1]), share_moved(before, after)
            return (next_params, next_state), (value, *moved)

        def one(params: PyTree, state: optax.OptState, key: Array) -> tuple:
            start = params, state
            (params, state), found = lax.scan(partial(step, key), start, (numbers, rates))
            return params, state, found

        return over_seeds(one, params, state, keys)

    def run(
        self, params: PyTree, seeds: Sequence[int], first: int, rates: Float[np.ndarray, " steps"]
    ) -> tuple[PyTree, Done]:
        """Trains float32 parameters with these learning rates, from the given step's data on."""
        task, chunk = self.task, self.task.config.chunk
        keys = keys_of(seeds)
        params, state = self.start(params, keys)
        validation, found = [task.evaluate(params)], []
        for i in range(0, len(rates), chunk):
            numbers = jnp.arange(first + i, first + i + chunk, dtype=jnp.int32)
            given = task.text, numbers, jnp.asarray(rates[i : i + chunk])
            params, state, one = self.chunk(params, state, keys, *given)
            found.append(one)
            validation.append(task.evaluate(params))
        steps = (np.concatenate(part, 1) for part in zip(*found, strict=True))
        return params, Done(*steps, np.stack(validation, 1))


def keys_of(seeds: Sequence[int]) -> Array:
    """What a seed's batches are drawn with, the same for every setting."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def rest(state: optax.OptState) -> PyTree:
    """What a state keeps of the parameters: jadam's residuals or flashoptim's, or None."""
    return optax.tree.get(state, "residual", optax.tree.get(state, "ecc"))


def share_moved(before: PyTree, after: PyTree) -> Float[Array, ""]:
    """The share of the parameters of which any part is another number."""
    per_part = [
        [a != b for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)]
        for old, new in zip(before, after, strict=True)
        if old is not None
    ]
    changed = [jnp.any(jnp.stack(parts), 0) for parts in zip(*per_part, strict=True)]
    return sum(jnp.sum(x) for x in changed) / sum(x.size for x in changed)
