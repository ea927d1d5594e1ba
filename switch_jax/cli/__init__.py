"""Command line of switch-jax."""

from switch_jax.cli.main import main

__all__ = ["main"]
