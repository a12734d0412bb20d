"""The one error that a user can cause and is meant to read."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Wrong input: the message is one clear sentence that says what to change.

    The command line prints it without a traceback and exits with code 2.
    """


def missing_extra(extra: str, package: str) -> InputError:
    """The error for a package that belongs to an optional extra and is not installed."""
    return InputError(f"this needs the package {package!r}: pip install vitzoo[{extra}]")


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
