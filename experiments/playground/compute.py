"""What the page draws: the path of each optimizer, and Adam's inner values along its own."""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

import jadam
from experiments.common.objectives import FUNCTIONS

MAX_STEPS = 1000
FAR = 1e6
"""A path further than this from the origin in x or y has diverged and ends."""
WEIGHT_DECAY = 0.01

Optimizer = Callable[..., optax.GradientTransformation]

# One slider serves them all: b1 is also the momentum, b2 also the decay of a mean square.
OPTIMIZERS: dict[str, Optimizer] = {
    "Adam": jadam.adam,
    "AdamW": functools.partial(jadam.adamw, weight_decay=WEIGHT_DECAY),
    "AMSGrad": jadam.amsgrad,
    "NAdam": jadam.nadam,
    "AdaMax": jadam.adamax,
    "RAdam": jadam.radam,
    "SGD": lambda learning_rate, b1, b2, eps: optax.sgd(learning_rate),
    "Momentum": lambda learning_rate, b1, b2, eps: optax.sgd(learning_rate, b1),
    "Nesterov": lambda learning_rate, b1, b2, eps: optax.sgd(learning_rate, b1, nesterov=True),
    "AdaGrad": lambda learning_rate, b1, b2, eps: optax.adagrad(learning_rate, eps=eps),
    "RMSProp": lambda learning_rate, b1, b2, eps: optax.rmsprop(learning_rate, b2, eps),
    "AdaDelta": lambda learning_rate, b1, b2, eps: optax.adadelta(learning_rate, b2, eps),
}


class Setting(NamedTuple):
    """What the sliders and the pickers say."""

    function: str = "himmelblau"
    learning_rate: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    x: float = FUNCTIONS["himmelblau"].start[0]
    y: float = FUNCTIONS["himmelblau"].start[1]
    steps: int = 200
    noise: float = 0.0
    """The standard deviation of what is added to each partial derivative."""
    seed: int = 0


class Descent(NamedTuple):
    """A path: its points and losses, and for each step between them the update and the state."""

    points: Float[np.ndarray, "steps+1 2"]
    losses: Float[np.ndarray, "steps+1"]
    updates: Float[np.ndarray, "steps 2"]
    state: Any
    """The optimizer's first state after each step; for Adam an `AdamState`."""
    diverged: bool = False


class Inner(NamedTuple):
    """Adam's values after each step, for x and y."""

    m: Float[np.ndarray, "steps 2"]
    m_hat: Float[np.ndarray, "steps 2"]
    v: Float[np.ndarray, "steps 2"]
    v_hat: Float[np.ndarray, "steps 2"]
    step: Float[np.ndarray, "steps 2"]
    rate: Float[np.ndarray, "steps 2"]


@functools.partial(jax.jit, static_argnums=0)
def _descend(
    optimizer: str,
    function: Int[ArrayLike, ""],
    start: Float[ArrayLike, "2"],
    hyperparameters: Mapping[str, Float[ArrayLike, ""]],
    noise: Float[ArrayLike, "n 2"],
) -> tuple[Array, Array, Array, Any]:
    """Point and loss before each step, its update, the state after. All but the name is traced."""
    tx = OPTIMIZERS[optimizer](**hyperparameters)
    values = [
        jax.value_and_grad(lambda point, f=f.value: f(point[0], point[1]))
        for f in FUNCTIONS.values()
    ]

    def step(carry: tuple[Array, optax.OptState], noise: Array) -> tuple[Any, Any]:
        point, state = carry
        loss, grad = lax.switch(function, values, point)
        updates, state = tx.update(grad + noise, state, point)
        return (optax.apply_updates(point, updates), state), (point, loss, updates, state[0])

    start = jnp.asarray(start)
    return lax.scan(step, (start, tx.init(start)), noise)[1]


def descend(optimizer: str, setting: Setting) -> Descent:
    """The path up to the steps of the setting, or to where it diverges, in float64.

    All MAX_STEPS are always made, so that another number of steps is not another compilation. Every
    optimizer gets the same noise.
    """
    hyperparameters = {
        name: np.float64(getattr(setting, name)) for name in ("learning_rate", "b1", "b2", "eps")
    }
    noise = np.random.default_rng(setting.seed).standard_normal((MAX_STEPS + 1, 2))
    with jax.enable_x64(True):
        points, losses, updates, state = jax.device_get(
            _descend(
                optimizer,
                np.int32(list(FUNCTIONS).index(setting.function)),
                np.array([setting.x, setting.y]),
                hyperparameters,
                setting.noise * noise,
            )
        )
    near = np.all(np.abs(points) <= FAR, axis=1) & np.isfinite(losses)
    shown = len(near) if near.all() else int(np.argmin(near))
    length = min(shown, setting.steps + 1)
    made = min(shown, setting.steps)
    return Descent(
        points[:length],
        losses[:length],
        updates[:made],
        jax.tree.map(lambda x: x[:made], state),
        diverged=shown <= setting.steps,
    )


def inner(descent: Descent, setting: Setting) -> Inner:
    """What is inside of Adam, Kingma & Ba (2015), Algorithm 1."""
    t = np.arange(1, len(descent.updates) + 1)[:, None]
    m, v = descent.state.mu, descent.state.nu
    m_hat = m / (1 - setting.b1**t)
    v_hat = v / (1 - setting.b2**t)
    rate = setting.learning_rate / (np.sqrt(v_hat) + setting.eps)
    return Inner(m, m_hat, v, v_hat, descent.updates, rate)


def warm_up() -> Iterator[str]:
    """Compile every optimizer; yields the names as they are ready."""
    with ThreadPoolExecutor() as pool:
        done = {pool.submit(descend, name, Setting()): name for name in OPTIMIZERS}
        for future in as_completed(done):
            future.result()
            yield done[future]
