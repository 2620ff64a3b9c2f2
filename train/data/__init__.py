"""Prepared data sets: written once by `beit-jax prepare`, then read as batches.

Written: `listing` lists the images below a folder; `image_folders`, `imagenet`, `ade20k`, `masks` and `digits` each
find a data set, a `Source` (`sources`); `prepare` checks and writes it; `shards` are its files.
Read: `datasets` opens a split and reads records; `batches` makes the batches of training, `evaluation_batches` those of
evaluation, both in `workers`; `stored_tokens` holds visual tokens of such a sequence of images.

May import: `train.augmentation`, `train.checkpoints` and below, `beit_jax.images`, the ground.
"""
