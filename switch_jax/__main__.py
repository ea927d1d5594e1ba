"""Entry point of `switch-jax` and `python -m switch_jax`."""

import sys


def main() -> int:
    """Runs the command line; Ctrl-C while it is imported is reported as at any other time."""
    try:
        from switch_jax.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("switch-jax: Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
