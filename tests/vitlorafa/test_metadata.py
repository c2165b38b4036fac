"""What users say of an adapter becomes JSON, or is refused before anything is written."""

import json
import os
from argparse import Namespace
from collections import namedtuple
from dataclasses import dataclass
from datetime import date
from enum import Enum, IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import naming
from small_models import build

from vitlorafa import AdapterConfig, AdapterError, inject, load_adapter, save_adapter


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@dataclass
class Run:
    step: int
    where: Path


Point = namedtuple("Point", "x y")
ITSELF: dict = {}
ITSELF["again"] = ITSELF


@pytest.fixture
def model():
    return inject(build("test_vit"), AdapterConfig(rank=np.int64(2), alpha=np.float32(3), seed=np.uint8(1)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([0.5, np.nan]), [0.5, None]),
        (torch.tensor(0.25), 0.25),
        (torch.tensor([1, 2], dtype=torch.int32), [1, 2]),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), [1.0, 1.0]),
        (Path("a") / "b", os.path.join("a", "b")),
        (Run(np.int32(3), Path("c")), {"step": 3, "where": "c"}),
        (Namespace(lr=1e-3), {"lr": 1e-3}),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (Point(1, np.int8(2)), [1, 2]),
        ({"b", "a"}, ["a", "b"]),
        (date(2026, 1, 2), "2026-01-02"),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.device("cpu"), "cpu"),
        (float("nan"), None),
        (-float("inf"), None),
        ({np.int64(1): {Colour.RED: 2}}, {"1": {"red": 2}}),
        ("Größe \U0001f600", "Größe \U0001f600"),
    ],
)
@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
def test_what_json_can_hold(model, value, expected, format, tmp_path):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    save_adapter(model, tmp_path, metadata={"x": value}, format=format)
    if format == "vitlorafa":
        text = (tmp_path / "adapter.json").read_text()
        assert json.loads(text, parse_constant=no_constant)["metadata"] == {"x": expected}
    load_adapter(build("test_vit"), tmp_path)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"x": [1, object()]}, ["metadata['x'][1]", "object", "JSON"]),
        ({"f": build}, ["metadata['f']", "function", "JSON"]),
        ({"b": b"x"}, ["metadata['b']", "bytes", "JSON"]),
        ({"c": 1j}, ["metadata['c']", "complex", "JSON"]),
        ({"t": torch.zeros(200, 200)}, ["metadata['t']", "40,000", "file"]),
        ({"m": torch.zeros(2, device="meta")}, ["metadata['m']", "meta device"]),
        ({(1, 2): 3}, ["key of metadata", "tuple", "string"]),
        ({1: "a", "1": "b"}, ["metadata", "1, 1"]),
        (ITSELF, ["metadata", "itself"]),
        ([1], ["metadata", "dict"]),
        ("text", ["metadata", "dict"]),
        (np.array([1]), ["metadata", "dict"]),
    ],
)
def test_what_it_cannot_hold(model, metadata, named, tmp_path):
    with pytest.raises(AdapterError, match=naming(*named)):
        save_adapter(model, tmp_path / "none", metadata=metadata)
    assert not (tmp_path / "none").exists()
