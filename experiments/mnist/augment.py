"""Random distortions of training images: turned, scaled, sheared, shifted and bent."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def distort(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Each of images float32[n, 28, 28, 1] seen through a random map of its own.

    At strength 1: turned by up to 0.2 rad, scaled and sheared by up to a tenth, shifted by up to
    2 pixels, and bent by a smooth random field of 0.6 pixels (Simard, Steinkraus & Platt 2003).
    """
    n, h, w, _ = images.shape
    affine, field = jax.random.split(key)
    turn, tall, wide, shear, down, right = strength * jax.random.uniform(
        affine, (6, n, 1, 1), minval=-1.0
    )
    # A pixel of the result is read at its place in the original, both measured from the centre.
    y = (jnp.arange(h, dtype=jnp.float32) - (h - 1) / 2).reshape(1, h, 1)
    x = (jnp.arange(w, dtype=jnp.float32) - (w - 1) / 2).reshape(1, 1, w)
    y, x = y * (1 + 0.1 * tall), x * (1 + 0.1 * wide) + 0.1 * shear * y
    cos, sin = jnp.cos(0.2 * turn), jnp.sin(0.2 * turn)
    y, x = cos * y - sin * x + 2 * down, sin * y + cos * x + 2 * right
    # One random vector in each 5.6 pixels, and a smooth surface through them.
    bent = jax.image.resize(jax.random.normal(field, (2, n, 5, 5)), (2, n, h, w), "cubic")
    places = jnp.stack([y + (h - 1) / 2, x + (w - 1) / 2]) + 0.6 * strength * bent
    sample = jax.vmap(lambda image, place: map_coordinates(image, list(place), order=1))
    return sample(images[..., 0], places.swapaxes(0, 1))[..., None]
