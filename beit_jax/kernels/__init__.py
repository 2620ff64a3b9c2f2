"""Kernels and forms of TPUs and GPUs: programs for a chip's own memory, which a compiler does not find by itself.

`tpu_rows` holds the kernels of attention for TPUs; `tpu` decides where they are computed, and `mesh` by which device.
`gpu_tiles` and `gpu` do the same for GPUs. `elements` holds the forms of a block's elements, for both.

May import: the ground.
"""
