"""Whether freed memory stays with the process, by the pages that it gets anew."""

import os
import platform
import sys

import pytest

from tests import forked
from vitlorafa import keep_freed_memory

if platform.libc_ver()[0] != "glibc":
    pytest.skip("only glibc's allocator has these options", allow_module_level=True)

# Prints how many new pages the third of three strings of 40 MB gets; each is freed before the next.
COUNT = """
import resource, sys
from vitlorafa import keep_freed_memory

accepted = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * len(sys.argv[1]) * 10_000_000
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(accepted, pages)
"""


def count(what: str) -> tuple[str, int]:
    """What `keep_freed_memory` returned in a process of its own, and the number of new pages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = forked.run([sys.executable, "-c", COUNT, what], check=True, text=True, env=environment)
    accepted, pages = process.stdout.split()
    return accepted, int(pages)


def test_a_string_gets_no_new_pages_after_one_of_its_size_was_freed() -> None:
    _, without = count("free")
    accepted, pages = count("keep")
    assert accepted == "True"
    assert without > 5000  # 40 MB in pages of 4 KiB are 9766
    assert pages < 100


def test_options_that_the_user_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000")
    assert not keep_freed_memory()
