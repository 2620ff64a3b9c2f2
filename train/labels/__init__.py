"""What is said about images: `targets` names the kinds, `table` reads them from a table, whose file `rows` reads.

May import: the library below training. Nothing here imports JAX.
"""
