"""What a run would be, without running it: `preview` from its shapes, `aot` from the compiled step.

May import: everything of training but the commands.
"""
