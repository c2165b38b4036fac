"""Amounts of memory and of disk space in words: decimal units everywhere, as --cache_gb has them."""

from rich.filesize import decimal

GB = 10**9


def format_size(count: float) -> str:
    """Formats bytes: "12 bytes", "3.4 GB".

    Args:
        count: Number of bytes.
    """
    return decimal(int(count))
