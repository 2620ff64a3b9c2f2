"""One optimizer step: a pure function from state and batch to state and metrics.

`state` is what a step reads and writes, `division` what of a model learns, with `adapting` for an adapter and
`freezing` for parts that stay, `criterion` the loss that is differentiated, `optim` and `schedule` say how parameters
move, `step` puts these together. May import: the ground, models and adapters of the library, `..recipe`.
"""
