"""Messages of other packages that tell the user nothing, which are left out."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def silence_bitsandbytes() -> None:
    """Leaves out that a package is missing for a function of bitsandbytes that is not used; PEFT imports it too."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def without_extension_messages() -> Iterator[None]:
    """Leaves out that PEFT could not compile the CUDA extension of BOFT, which has a way without it."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.tuners\.boft")
            yield
    finally:
        logger.setLevel(level)
