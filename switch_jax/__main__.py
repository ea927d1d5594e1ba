"""`python -m switch_jax` is `switch-jax`."""

import sys

from switch_jax.cli import main

sys.exit(main())
