"""Fixtures that both packages' tests share."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from vitlorafa import tuning
from vitlorafa.kept_ways import machine_file

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fastest_ways_of_one_test():
    yield
    tuning.use_ways({})
    tuning.pin({})


@pytest.fixture(autouse=True, scope="session")
def _image_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOMAINBED_EXT_CACHE", str(tmp_path_factory.mktemp("image_cache")))
        yield


def pytest_configure(config):
    # Tests run side by side, one process a core: more threads each would only get in each other's way.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matmul on a GPU, of whatever test
    # Nothing is timed, so that tests do the same on every processor: those of other ways set them.
    os.environ.update(VITLORAFA_TUNE="off", VITLORAFA_CACHE=tempfile.mkdtemp(prefix="vitlorafa_"))
    os.environ.pop("VITLORAFA_WAYS", None)


def pytest_unconfigure():
    shutil.rmtree(os.environ["VITLORAFA_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("pacs") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs the PACS images and ViT-Ti/16 weights"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test computes: it runs on the CPU everywhere, so that the same test on a GPU cannot rot.

    A GPU computes float32 in full, and in a fixed order, as in runs.
    """
    device = torch.device(request.param)
    if device.type == "cpu":
        yield device
        return
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield device
    finally:
        torch.use_deterministic_algorithms(False)


class Clock:
    """A clock for the fastest ways: every look at it takes a millisecond, and nothing else any time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Ways are timed by a clock of the test's, on a machine where none was before."""
    monkeypatch.setenv("VITLORAFA_TUNE", "on")
    monkeypatch.setenv("VITLORAFA_CACHE", str(tmp_path / "ways"))
    monkeypatch.setattr(tuning, "_clock", clock := Clock())
    monkeypatch.setattr(tuning, "_state", tuning._State())
    machine_file.cache_clear()
    yield clock
    machine_file.cache_clear()


@pytest.fixture
def shared_data():
    return SHARED
