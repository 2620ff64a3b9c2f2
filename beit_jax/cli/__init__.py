"""The `beit-jax` command: arguments in, text for people or JSON for programs out.

`main` is the command line, `arguments` what many commands take, `training` the commands on recipes and data, `plot` the
pictures, `demo` and `inspection` what those two commands do. Imports wait until a command runs, so that ``--help``
loads neither JAX nor Pillow. May import: everything. Nothing imports this package.
"""
