"""Kernels: programs for a chip's own memory, which a compiler does not find by itself.

`tpu_rows` holds the kernels of attention for TPUs; `tpu` decides where they are computed, and `mesh` by which device.
`gpu_tiles` and `gpu` do the same for GPUs.

May import: the ground.
"""
