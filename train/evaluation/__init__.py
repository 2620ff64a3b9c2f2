"""Scores of trained models.

`accuracy` counts classifications, `confusion` draws them, `labelled` evaluates a directory of labelled images;
`segmentation` has mIoU, `neighbours` classifies features by k-NN, `shares` has the arithmetic of both kinds of scores.

May import: `train.data`, `train.distributed`, `train.augmentation` and below, `beit_jax.inference` and below.
"""
