"""The start of a run: the configuration of its model (`model_config`) and its first parameters (`parameters`).

May import: the library below training, `..recipe`.
"""
