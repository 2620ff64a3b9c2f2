"""What a run starts from: the configuration of its model (`model_config`) and its first parameters (`parameters`).

May import: the library below training, `..recipe`.
"""
