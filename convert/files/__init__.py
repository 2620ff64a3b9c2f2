"""Weight files as bytes: names, shapes and types from the header, tensors read by position.

One module a file type; `checkpoint` opens whichever a path names. May import: the ground of `beit_jax`, `..pickles`.
"""
