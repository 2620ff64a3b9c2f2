"""``python -m beit_jax``: the `beit-jax` command, which lives in `beit_jax.cli.main`."""

import sys

from beit_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
