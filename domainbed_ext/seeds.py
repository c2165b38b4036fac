"""DomainBed's seeds and splits: every random choice of a run follows from a few small integers."""

import hashlib
from typing import Any


def seed_hash(*args: Any) -> int:
    """A seed in [0, 2³¹) from the `repr` of its arguments, as DomainBed makes it.

    Args:
        *args: plain Python values. A NumPy scalar has another `repr` than the number it stands for, and so
            another seed: convert it first.

    Returns:
        `md5(str(args)) mod 2³¹`.
    """
    return int(hashlib.md5(str(args).encode("utf-8")).hexdigest(), 16) % (2**31)
