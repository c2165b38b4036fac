"""Counts the files that are opened: `OPENED` names all since it was last cleared."""

import sys

import pytest

from domainbed_ext.cache import fingerprint

OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


@pytest.fixture
def settled(monkeypatch):
    """Images that were written just now are as good as old ones."""
    monkeypatch.setattr(fingerprint, "SETTLED", 0.0)
