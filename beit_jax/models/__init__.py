"""The models as Flax modules: `attention`, `layers`, `encoder`, then heads and segmentation on top.

`partition` says where activations lie, `position` and `activations` are what layers are made of, `dense` works on feature
maps, `heads` and `segmenter` hold the model classes, `adapt` changes a checkpoint's sizes. May import: the ground.
"""
