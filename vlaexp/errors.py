"""The one exception that a user is meant to read, and the nearest name to put into it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The text gives the value, the wish and the next step; the CLI prints it without a traceback."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`available: a, b, c; nearest: b` for an error about a name that does not exist."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    listing = f"available: {', '.join(options) or 'none'}"
    return f"{listing}; nearest: {close[0]}" if close else listing
