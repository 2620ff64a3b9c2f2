"""CAE, which has BEiT's blocks under BEiT's names: `original` are its authors' files, `paddle` those of PaddleClas.

PaddleClas lays BEiT v2 out in the same way, and its page knows both. May import what the other pages may: the ground of
`beit_jax`, its images, types of `..files`, and in `convert.formats`: `unilm`, `format`, `rules` and `heads`.
"""
