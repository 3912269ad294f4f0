"""The one exception whose text is meant for the person at the keyboard."""

import contextlib
from collections.abc import Iterator, Sequence


class UserError(Exception):
    """Bad input. The message is one clear line that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 1; library users can catch it. Names out of
    files may be in it: what is not printable, such as line breaks and codes for terminals, is shown as its escape.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


@contextlib.contextmanager
def collect(faults: list[str]) -> Iterator[None]:
    """Notes a UserError of its body and goes on, so that all faults can be told at once."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))


def raise_all(faults: Sequence[str], prefix: str = "") -> None:
    """One UserError with every fault, if there are any."""
    if faults:
        count = f"{len(faults)} faults: " if len(faults) > 1 else ""
        raise UserError(prefix + count + "; ".join(faults))
