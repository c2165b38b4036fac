"""Small data sets on disk, and runs short enough for a test."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.data.splits import Split
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.objectives.registry import OBJECTIVES
from domainbed_ext.runs import imports
from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.system import processes
from domainbed_ext.trackers.registry import TRACKERS
from tests import forked

PACS_DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "house")


def make_domains(root: Path, domains=PACS_DOMAINS, classes=CLASSES, images=10, side=40, tint=100) -> Path:
    """A folder of domains with random images; colours tell the classes apart."""
    draw = np.random.default_rng(0)
    for domain in domains:
        for label, name in enumerate(classes):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = draw.integers(0, 128, (side, side, 3), dtype=np.uint8)
                pixels[..., label % 3] += tint
                Image.fromarray(pixels).save(folder / f"pic_{number:03d}.png")
    return root


@pytest.fixture
def pacs_like(tmp_path):
    """A data_dir with a PACS of 4 × 2 × 10 images."""
    make_domains(tmp_path / "data" / "PACS")
    return tmp_path / "data"


@pytest.fixture
def make_args(tmp_path):
    """Arguments of a short run on DigitsShift; keywords override them."""

    def make(**overrides):
        values = {"steps": 3, "checkpoint_freq": 0, "train_eval_share": 0.1, "output_dir": str(tmp_path / "run")}
        return RunArguments(**{**values, **overrides})

    return make


@pytest.fixture
def few_evaluated(monkeypatch):
    """Of each split, eight images are evaluated."""
    from domainbed_ext.runs.setup import Setup  # torch, which not all tests need

    whole = Setup.evaluated

    def evaluated(setup, name):
        split = whole(setup, name)
        return Split(split.environment, split.keys[:8])

    monkeypatch.setattr(Setup, "evaluated", evaluated)


@pytest.fixture
def registries(monkeypatch):
    """The registries of methods, objectives, data sets and trackers, which forget what a test registers or imports."""
    four = METHODS, OBJECTIVES, DATASETS, TRACKERS
    before, modules = [registry.registered() for registry in four], dict(sys.modules)
    monkeypatch.setattr(imports, "_loaded", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield four
    for registry, things in zip(four, before, strict=True):
        registry.restore(things)
    for name in [name for name in sys.modules if name not in modules and name.startswith(("mine", "their"))]:
        del sys.modules[name]


@pytest.fixture
def warm_workers(monkeypatch):
    """Workers of launchers have torch from the start, which otherwise takes each of them four seconds to import."""
    monkeypatch.setattr(type(processes.HELPERS), "Process", forked.Helper)
