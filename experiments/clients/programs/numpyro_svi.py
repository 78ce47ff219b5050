"""Stochastic variational inference: numpyro wraps an optax transformation, in `lax.scan`."""

import json

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

x = jax.random.normal(jax.random.key(0), (100, 4))
y = (x @ jnp.array([1.0, -1.0, 2.0, 0.0]) > 0).astype(int)


def model(x, y):
    w = numpyro.sample("w", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)


optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-2))
svi = SVI(model, AutoMultivariateNormal(model), optimizer, Trace_ELBO(num_particles=8))
found = svi.run(jax.random.key(1), 500, x, y, progress_bar=False)
print(json.dumps({"losses": [float(loss) for loss in found.losses]}))
