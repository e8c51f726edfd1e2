"""Command-line options that several benchmarks have in common."""

import argparse
from collections.abc import Sequence


def names_of(parser: argparse.ArgumentParser, flag: str, value: str, known: Sequence[str]) -> list[str]:
    """Return the names in a value such as `reference,fast`; ends the program where one is unknown.

    Args:
        parser: of the command line.
        flag: that has the value.
        value: names with commas between them.
        known: what may be named.
    """
    names = [name.strip() for name in value.split(",")]
    if unknown := set(names) - set(known):
        parser.error(f"{flag}: {', '.join(sorted(unknown))} is unknown; choose from {','.join(known)}")
    return names
