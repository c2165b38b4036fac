"""A checkout of upstream DomainBed for the tests that need one: DOMAINBED_CHECKOUT, or DomainBed/ nearby."""

import os
from pathlib import Path

import pytest
from PIL import ImageFile

from domainbed_ext import upstream

ROOT = Path(__file__).resolve().parents[2]
HALF_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES
PLACES = (ROOT.parent / "DomainBed", ROOT / "scratch" / "DomainBed")


@pytest.fixture(scope="session")
def checkout():
    """Its folder; upstream's modules are imported and registered with, and load data in the test's own process."""
    given = os.environ.get(upstream.VARIABLE)
    found = [Path(given)] if given else [place for place in PLACES if (place / "domainbed").is_dir()]
    if not found:
        pytest.skip(f"needs a checkout of facebookresearch/DomainBed: set {upstream.VARIABLE}")
    root = upstream.register(found[0])
    upstream.set_workers(0)
    return root


@pytest.fixture(autouse=True)
def _upstreams_settings_end_here():
    """Upstream's import tells PIL to take half an image for a whole one, which is not to reach other tests."""
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = HALF_IMAGES
