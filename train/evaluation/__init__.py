"""Scores: `accuracy` of classifiers, `segmentation`'s mIoU, `probe` of frozen features; `labelled` images, `confusion`.

May import: `..data`, `..distributed`, `..augmentation`, the library.
"""
