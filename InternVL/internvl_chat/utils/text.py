"""Text helpers for messages."""


def counted(number: int, noun: str) -> str:
    """Return a count with its noun in the singular or plural.

    >>> counted(1, "error"), counted(1200, "record"), counted(0, "leak")
    ('1 error', '1,200 records', '0 leaks')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
