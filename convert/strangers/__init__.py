"""Files that are no weights of BEiT for this library, each by its own mark: what wrote it, and what makes it readable.

The marks are those that the programs themselves write. `heads` knows first bytes, `contents` records of an archive and
entries of a pickle, `tensor_names` names of tensors, and `file_names` files by name and those of a folder; `kind` holds
what they answer. What no mark tells is left to the reader that meets it. May import: the ground of `beit_jax` and
`..pickles`.
"""
