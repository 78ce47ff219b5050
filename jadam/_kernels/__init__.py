"""A leaf's step in one pass over memory, where the platform has a kernel for it.

`choice` says which kernel has which leaf, `primitive` is the one JAX primitive under all of them,
`partitioning` divides it over devices, `jax_internals` holds what is not public in JAX, and each
platform's kernel has a room of its own.
"""
