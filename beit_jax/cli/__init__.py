"""The `beit-jax` command: arguments in, text for people or JSON for programs out.

`main` holds the table of commands and runs one. The commands are in `conversion`, `inference`, `evaluating`,
`searching`, `plot`, `preparing` and `training`. `arguments` holds arguments that several commands take,
`demo` and `inspection` the work of these two commands. `main` imports the module of a command when
that command is named, and most commands import JAX when they run: ``beit-jax --help`` loads neither JAX nor Pillow. May
import: everything. Nothing imports this package.
"""
