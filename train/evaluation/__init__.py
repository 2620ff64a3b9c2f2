"""Scores of trained models.

`accuracy` counts classifications, `confusion` draws them; `multilabel` ranks classes of which several may hold,
`regression` measures distances of numbers, both of the outputs that `logits` collects. `opening` opens a directory or
table of labelled images, which `labelled` evaluates, and whose classes `matching` finds among the model's.
`segmentation` has mIoU of what `truths` says of pixels, `neighbours` classifies features by k-NN, `neighbour_scores`
images; `shares` has the arithmetic of all kinds of scores.

May import: `train.data`, `train.distributed`, `train.augmentation` and below, `beit_jax.search` and below.
"""
