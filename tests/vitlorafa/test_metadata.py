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
    ("metadata", "message"),
    [
        ({"x": [1, object()]}, r"metadata\['x'\]\[1\] is a object, which JSON cannot hold"),
        ({"f": build}, r"metadata\['f'\] is a function, which JSON"),
        ({"b": b"x"}, r"metadata\['b'\] is a bytes, which JSON"),
        ({"c": 1j}, r"metadata\['c'\] is a complex, which JSON"),
        ({"t": torch.zeros(200, 200)}, r"metadata\['t'\] has 40,000 values, too many for JSON"),
        ({"m": torch.zeros(2, device="meta")}, r"metadata\['m'\] is a tensor on the meta device"),
        ({(1, 2): 3}, "a key of metadata is a tuple: JSON's keys are text"),
        ({1: "a", "1": "b"}, "metadata has keys that are the same in JSON: 1, 1"),
        (ITSELF, "metadata contains itself"),
        ([1], "metadata is not a dict"),
        ("text", "metadata is not a dict"),
        (np.array([1]), "metadata is not a dict"),
    ],
)
def test_what_it_cannot_hold(model, metadata, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        save_adapter(model, tmp_path / "none", metadata=metadata)
    assert not (tmp_path / "none").exists()
