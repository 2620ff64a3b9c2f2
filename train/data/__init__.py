"""Prepared data sets: written by `prepare` from what `builders` find, read as batches by `batches`; `stored_tokens`.

May import: `..augmentation`, `..checkpoints`, the library.
"""
