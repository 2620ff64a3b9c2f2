"""A run from beginning to end: `plan` resolves it, `run` carries it out, and `start` does both in one call.

`program` is the compiled step with its shapes and places, `contract` what a run's directory promises, `scores` its
evaluations and `best` the best of them, `results` the models it writes, `log`, `metrics_file` and `timing` what people
see, `watch` what ends a run from outside, `kernel_check` whether a device's kernels compute what they should. May
import: the library, and every room of training below; no forecast, no command.
"""
