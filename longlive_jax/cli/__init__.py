"""`longlive`: one command, a subcommand a task. Errors of the user are one line and a non-zero exit."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from longlive_jax.cli.convert import Convert
from longlive_jax.cli.generate import Generate
from longlive_jax.cli.parity import Parity
from longlive_jax.errors import UserError

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate", description=Generate.__doc__)]
    | Annotated[Convert, tyro.conf.subcommand("convert", description=Convert.__doc__)]
    | Annotated[Parity, tyro.conf.subcommand("parity", description=Parity.__doc__)]
)


def main(args: list[str] | None = None) -> None:
    """Runs the command line; exits 0 on success, 1 on a user's error, 2 on wrong usage, 130 on Ctrl-C."""
    command = tyro.cli(Command, prog="longlive", args=args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        code = command.run()
    except UserError as error:
        print(f"longlive: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("longlive: stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
