"""Kernels of one CPU, in C++: products of float32 whose end is fused, attention whose scores stay in a core's caches,
GELU and LayerNorm in one pass; and their gradients.

XLA calls them through `jax.ffi`. `library` compiles the files beside it for the machine it runs on, once, with the
compiler that is there; `calls` makes functions of JAX of them. Without a compiler XLA's forms are computed.

May import: the ground.
"""
