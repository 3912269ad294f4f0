"""`longlive`: one command, a subcommand a task. Errors of the user are one line and a non-zero exit."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from longlive_jax.cli.bench import Bench
from longlive_jax.cli.convert import Convert
from longlive_jax.cli.generate import Generate
from longlive_jax.cli.parity import Parity
from longlive_jax.cli.train import train_command
from longlive_jax.errors import UserError


def _subcommand(kind: type):
    """The description is the docstring without its list of attributes, which tyro shows as the options' help."""
    summary = kind.__doc__.split("\n\n")[0]
    return Annotated[kind, tyro.conf.subcommand(kind.__name__.lower(), description=summary)]


def _command(args: list[str]):
    """All subcommands; the options of `train` depend on its config file."""
    fixed = _subcommand(Generate) | _subcommand(Convert) | _subcommand(Parity) | _subcommand(Bench)
    return fixed | _subcommand(train_command(args))


def main(args: list[str] | None = None) -> None:
    """Runs the command line; exits 0 on success, 1 on a user's error, 2 on wrong usage, 130 on Ctrl-C.

    Training that ended in time and is not done exits 3.
    """
    args = sys.argv[1:] if args is None else args
    try:
        command = tyro.cli(_command(args), prog="longlive", args=args, config=(tyro.conf.FlagCreatePairsOff,))
        code = command.run()
    except UserError as error:
        print("longlive:", str(error).replace("\n", " "), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("longlive: stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
