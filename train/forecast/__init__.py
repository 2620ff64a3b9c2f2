"""Forecasts of a run that is not run: `preview` from its shapes, `aot` from the compiled step.

May import: everything of training but the commands.
"""
