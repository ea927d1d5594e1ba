"""`switch-jax completion`: a script with which a shell completes command lines."""

import argparse

HELP = "print a script for Tab completion in bash, zsh or fish"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="shell that runs the script")


def run(args: argparse.Namespace) -> None:
    """Prints the script."""
    from argcomplete import shellcode

    print(shellcode(["switch-jax"], shell=args.shell))
