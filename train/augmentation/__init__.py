"""The changes of training images, on the host and on the device.

On the host, without JAX: `decode` reads a record; `classification`, `segmentation` and `views` (for pre-training) crop,
flip and change colours, with `randaugment`; `masking` draws masks of patches; `resample`, `kernels` and `smooth` make
Pillow's pixels faster. On the device: `mixing` normalises, erases and mixes, `labels` checks what classes images have,
and `pixel_losses` compares label maps with logits.

May import: `train.recipe`, `beit_jax.images`, the ground.
"""
