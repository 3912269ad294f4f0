"""The one exception whose text is meant for the person at the keyboard."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence

LISTED = 6
"""Names, or groups of names, that a message spells out."""

LONGEST = 120
"""Characters of one that are shown: a stranger's file may have any."""

NUMBER = re.compile(r"(?<=[._])(?:0|[1-9]\d{0,8})(?=[._])")
"""A layer, in the name of a tensor."""


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


def listed(names: Iterable[str]) -> str:
    """Names of tensors for a message: `blocks.0.norm.weight` and so on as one, a few of these, and how many more."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for name in names:
        layer = NUMBER.search(name)
        key = (name, None) if layer is None else (name[: layer.start()], name[layer.end() :])
        groups.setdefault(key, []).append(0 if layer is None else int(layer[0]))
    shown = []
    for (head, tail), numbers in list(groups.items())[:LISTED]:
        text = head if tail is None else f"{head}{_ranges(numbers)}{tail}"
        shown.append(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")
    more = sum(len(numbers) for numbers in list(groups.values())[LISTED:])
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2 and 5 as "0-2,5"."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
