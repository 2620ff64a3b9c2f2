"""Scores of trained models.

`accuracy` counts classifications, `confusion` draws them; `multilabel` ranks classes of which several may hold,
`regression` measures distances of numbers, both of the outputs that `logits` collects. `labelled` evaluates a directory
or table of labelled images, whose classes `matching` finds among the model's.
`segmentation` has mIoU of what `truths` says of pixels, `neighbours` classifies features by k-NN, `shares` has the
arithmetic of all kinds of scores.

May import: `train.data`, `train.distributed`, `train.augmentation` and below, `beit_jax.looking` and below.
"""
