"""Weight files as bytes: names, shapes and types come from the header, and tensors are read by position.

`checkpoint` opens a directory or a file and is what others import. A file type is one module: `safetensors_file`,
`torch_file` with `torch_container` for the two files around a pickle, `array_pickle` for pickles of NumPy's arrays,
`distributed_folder` for those of torch.distributed.checkpoint, `msgpack_file`, and `h5_file` with `keras_names` and
`keras_archive`. `weight_file` holds what they share, `zip_archive` reads the directory of a zip, `shard_index` the
index of a checkpoint in several files; `adapters` knows those of peft. What is no weights at all is told by
`..strangers`. May import: the ground of `beit_jax`, `..pickles` and `..strangers`.
"""
