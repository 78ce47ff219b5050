"""The optimizer's share of whole training steps.

    python -m experiments.bench.whole

The model is a GPT of bytes with GPT-2 small's depth and width, on one short sequence: the
optimizer's share is largest where a step has few tokens. Each round times the loss and its
gradients alone, and the whole step with each optimizer. The share is the difference of the two, as
a part of the whole step.
"""

import os
import random
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import track

import jadam
from experiments.bench.contenders import OPTIONS
from experiments.bench.publish import README, write
from experiments.bench.trials import Trial
from experiments.common import report
from experiments.common.gpt import GPT, Shape, loss_fn

GRADIENTS = "loss and gradients alone"


@dataclass(frozen=True)
class Config:
    """Times whole training steps; writes JSON and the table of the bench's README."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    tokens: int = 64
    """Length of the one sequence in a step."""
    rounds: int = 25


def trials(config: Config) -> dict[str, Trial]:
    """A training step with each optimizer, and without one."""
    shape = Shape(config.layers, config.width, config.heads, config.tokens)
    graph, params = nnx.split(GPT(shape, rngs=nnx.Rngs(0)))
    text = jax.random.randint(jax.random.key(0), (1, config.tokens + 1), 0, 256)

    def loss_and_grads(params: Any) -> tuple[Any, Any]:
        return jax.value_and_grad(lambda params: loss_fn(nnx.merge(graph, params), text))(params)

    def trained(tx: Any, fused: bool) -> Trial:
        def step(params: Any, state: Any) -> tuple[Any, ...]:
            loss, grads = loss_and_grads(params)
            if fused:
                return *tx.step(grads, state, params), loss
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        jitted = jax.jit(step, donate_argnums=(0, 1))
        held = [jax.tree.map(jnp.copy, params), tx.init(params)]

        def run() -> Any:
            held[:] = jitted(*held)[:2]
            return held

        return Trial(run, wait=jax.block_until_ready)

    only = jax.jit(loss_and_grads)
    return {
        GRADIENTS: Trial(lambda: only(params), wait=jax.block_until_ready),
        "jadam step": trained(jadam.adamw(**OPTIONS), fused=True),
        "jadam update": trained(jadam.adamw(**OPTIONS), fused=False),
        "optax": trained(optax.adamw(**OPTIONS), fused=False),
    }


def measure(config: Config) -> dict[str, Any]:
    """Seconds a step, and the optimizer's share of them."""
    contenders = trials(config)
    for trial in contenders.values():
        trial.seconds()
    rounds = []
    for number in track(range(config.rounds), "whole steps"):
        # Another order in each round: nobody always comes after the same one.
        order = random.Random(number).sample(list(contenders), len(contenders))
        rounds.append({name: contenders[name].seconds()[1] for name in order})
    found = {}
    for name in contenders:
        shares = [1 - r[GRADIENTS] / r[name] for r in rounds]
        found[name] = {
            "seconds": report.quartiles([r[name] for r in rounds]),
            "share": report.quartiles(shares),
        }
    return found


COLUMNS = ("", "ms", "the optimizer's share")


def cells(results: dict[str, Any]) -> list[list[str]]:
    return [
        [name, f"{1e3 * found['seconds']['median']:.0f}", report.spread(found["share"])]
        for name, found in results["steps"].items()
    ]


def markdown(results: dict[str, Any]) -> str:
    """The shares as this folder's README shows them."""
    size = "{layers} layers of width {width}, {tokens} tokens a step".format(**results["config"])
    return f"{report.table(COLUMNS, cells(results))}\n\n({size}; {results['machine']})"


def main(config: Config = Config()) -> None:
    """Measure, print, write the JSON, and bring the README up to date."""
    results = {
        **report.provenance("python -m experiments.bench.whole"),
        "load_average_before": os.getloadavg()[0],
        "config": vars(config),
        "steps": measure(config),
    }
    console = Console()
    report.show(console, "Whole training steps", COLUMNS, cells(results))
    console.print(f"written to {write('whole', results)}")
    report.update_readme("whole", markdown(results), README)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.bench.whole"))
