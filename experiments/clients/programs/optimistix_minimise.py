"""`optimistix.OptaxMinimiser`: a transformation as a field of a solver, in its while loop."""

import json

import jax
import jax.numpy as jnp
import optax
import optimistix


def rosenbrock(x, _):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


losses = []
for adam in (optax.adam(3e-2), optax.nadamw(1e-2)):
    solver = optimistix.OptaxMinimiser(adam, rtol=1e-7, atol=1e-9)
    for steps in (10, 100, 1000, 3000):
        found = jax.jit(
            lambda x, solver=solver, steps=steps: (
                optimistix.minimise(rosenbrock, solver, x, max_steps=steps, throw=False).value
            )
        )(jnp.array([-1.2, 1.0, 0.5, 2.0]))
        losses.append(float(rosenbrock(found, None)))
print(json.dumps({"losses": losses}))
