"""A neural ODE: its vector field is learned through an adaptive solver and its adjoint."""

import json

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

field = eqx.nn.MLP(2, 2, 32, 2, activation=jax.nn.softplus, key=jax.random.key(0))
times = jnp.linspace(0.0, 3.0, 20)
starts = jax.random.uniform(jax.random.key(1), (16, 2), minval=-0.6, maxval=1.0)


def solved(vector_field, y0):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=0.1,
        y0=y0,
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
        saveat=diffrax.SaveAt(ts=times),
    ).ys


def pendulum(t, y, args):
    return jnp.array([y[1], -jnp.sin(y[0])])


target = jax.vmap(lambda y0: solved(pendulum, y0))(starts)
optimizer = optax.adam(3e-3)
state = optimizer.init(eqx.filter(field, eqx.is_inexact_array))


@eqx.filter_jit
def make_step(field, state):
    def loss_of(field):
        found = jax.vmap(lambda y0: solved(lambda t, y, args: field(y), y0))(starts)
        return jnp.mean((found - target) ** 2)

    loss, grads = eqx.filter_value_and_grad(loss_of)(field)
    updates, state = optimizer.update(grads, state)
    return eqx.apply_updates(field, updates), state, loss


losses = []
for _ in range(100):
    field, state, loss = make_step(field, state)
    losses.append(float(loss))
print(json.dumps({"losses": losses}))
