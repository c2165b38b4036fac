"""DomainBed's seeds: every random choice of a run follows from a few small integers."""

import hashlib
from typing import Any


def seed_hash(*args: Any) -> int:
    """A seed in [0, 2³¹) from the `repr` of its arguments, as DomainBed computes it.

    Args:
        *args: Plain Python values. Convert NumPy scalars first: their `repr` differs from that of the same Python
            number, and so does the seed.

    Returns:
        `md5(str(args)) mod 2³¹`.
    """
    return int(hashlib.md5(str(args).encode("utf-8")).hexdigest(), 16) % (2**31)
