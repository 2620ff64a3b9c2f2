"""Open-MMLab: mmsegmentation's UperNet on BEiT, by names of unilm's day (0.x) and of 1.x, and mmpretrain's BEiT.

Three pages of one family: `mmseg` has the names of 0.x, which are the original's; `mmsegmentation` and `mmpretrain`
share the names of 1.x and 2.x in `names`, and the Python file that such a library builds its model from in `settings`.
May import what the other pages may: the ground of `beit_jax`, its images and weights, types of `..files`, and the parts
and pages in `convert.formats`: `unilm`, `format`, `rules`, `segmentation`, `heads` and `writing`.
"""
