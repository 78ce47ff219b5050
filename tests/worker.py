"""One process of a training: a perceptron, data-parallel, its optimizer's state divided (ZeRO-1).

    python -m tests.worker --checkpoints DIR --steps 8 --process 0 --processes 4 --port 1234

The digits are the 10,000 test images of the repository, read without tensorflow-datasets, whose
import alone takes longer than the training.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from experiments.common.mnist.idx import FILES, TEST_IMAGES, TEST_LABELS, read_images, read_labels
from jadam.sharding import divided, state_shardings

BATCH = 64
SAVE_EVERY = 2
# The default eps would make whole steps of gradients that are nothing but rounding.
OPTIMIZERS = {
    "float32": jadam.adamw(1e-3, eps=1e-3),
    "8-bit": jadam.adamw(1e-3, eps=1e-3, mu_dtype="int8", nu_dtype="uint8"),
}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images float32[10000, 28, 28, 1] in [0, 1] and labels int32[10000]."""
    images = read_images(FILES / TEST_IMAGES)
    return images.astype(np.float32) / 255, read_labels(FILES / TEST_LABELS)


def initial() -> dict[str, np.ndarray]:
    """The parameters: a layer of 256, which is little to compile."""
    rng = np.random.default_rng(0)
    shapes = {"w": (784, 256), "b": (256,), "head": (256, 10)}
    return {name: 0.05 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross entropy."""
    hidden = jax.nn.relu(images.reshape(-1, 784) @ params["w"] + params["b"][None])
    logits = hidden @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Training:
    """Parameters and state on a mesh, from the last checkpoint if there is one."""

    def __init__(self, mesh: Mesh, optimizer: str = "float32", checkpoints: Path | None = None):
        tx = OPTIMIZERS[optimizer]
        whole, self.by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        params = jax.device_put(initial(), whole)
        zero, shardings = divided(params, axis="data"), state_shardings(tx, params, axis="data")
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        self.count, self.arrays, self.checkpoints = 0, (params, state), None
        self.digits = digits()
        if checkpoints is not None:
            options = ocp.CheckpointManagerOptions(
                save_interval_steps=SAVE_EVERY, enable_async_checkpointing=False
            )
            self.checkpoints = ocp.CheckpointManager(checkpoints, options=options)
            if self.checkpoints.latest_step() is not None:
                self.restore(self.checkpoints.latest_step())

        def mean_gradient(params: Any, images: jax.Array, labels: jax.Array) -> Any:
            return lax.pmean(jax.grad(loss)(params, images, labels), "data")

        rows = (P(), P("data"), P("data"))
        gradient = jax.shard_map(
            mean_gradient, mesh=mesh, in_specs=rows, out_specs=P(), check_vma=False
        )

        def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
            grads = lax.with_sharding_constraint(gradient(params, images, labels), zero)
            part = lax.with_sharding_constraint(params, zero)
            updates, state = tx.update(grads, state, part)
            return optax.apply_updates(part, updates), state

        self.jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(whole, shardings))

    def restore(self, count: int) -> None:
        """The arrays of a checkpoint, each in the place of the one that is here now."""
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.arrays
        )
        self.arrays = self.checkpoints.restore(count, args=ocp.args.StandardRestore(target))
        self.count = count

    def step(self) -> None:
        """The next batch, of which each process makes its rows, and a checkpoint when it is due."""
        rows = slice(self.count * BATCH, (self.count + 1) * BATCH)
        batch = [
            jax.make_array_from_callback(x[rows].shape, self.by_rows, x[rows].__getitem__)
            for x in self.digits
        ]
        self.arrays = self.jitted(*self.arrays, *batch)
        self.count += 1
        if self.checkpoints is not None:
            self.checkpoints.save(self.count, args=ocp.args.StandardSave(self.arrays))

    @property
    def params(self) -> list[np.ndarray]:
        """The parameters, which are whole on each device."""
        return [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(self.arrays[0])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="float32")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--dies", type=int, help="the process that kills itself")
    parser.add_argument("--after", type=int, default=0, help="when it does so")
    arguments = parser.parse_args()
    jax.distributed.initialize(
        f"localhost:{arguments.port}",
        arguments.processes,
        arguments.process,
        # What is lost when a process hangs; when it dies, its closed sockets tell at once.
        heartbeat_timeout_seconds=20,
        shutdown_timeout_seconds=20,
    )
    mesh = Mesh(np.array(jax.devices()), "data")
    training = Training(mesh, arguments.optimizer, arguments.checkpoints)
    while training.count < arguments.steps:
        training.step()
        print(f"step {training.count}", flush=True)
        if arguments.process == arguments.dies and training.count == arguments.after:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
