"""Memory by rank, by number of adapted blocks and by resolution: what it counts, and its files."""

import csv
from dataclasses import replace
from importlib.util import find_spec

import pytest
from messages import assert_only_error

from vitlorafa.bench import case as cases
from vitlorafa.bench import formulas, machine, measure
from vitlorafa.bench.__main__ import main
from vitlorafa.bench.case import Case
from vitlorafa.bench.methods import METHODS, adapter_of, build
from vitlorafa.config import TARGETS

DEEP = Case("test_vit", 2, 32, "bf16", rank=4, targets=TARGETS, depth=4, head=True)
SIZES = {"model": "test_vit", "resolution": 32, "batch_size": 6, "depth": 2, "rank": 2, "device": "cpu"}
OPTIONS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
GRIDS = ["--ranks", "1", "8", "--blocks", "1", "2", "--resolutions", "32", "48"]
ADAPTERS = ["lora_fa", "lora_fa_plain", "lora", "lora_separate", *(["peft_lora"] if find_spec("peft") else [])]


def run(tmp_path, *options):
    return main(["growth", *OPTIONS, "--output_dir", str(tmp_path / "out"), *options])


def kept(method, case):
    return measure.measure_saved(build(method, case), case).activations


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_of_the_last_blocks_keep_what_a_model_of_these_blocks_does(method):
    for number in (1, 3):
        stack = replace(cases.stack_of(DEEP), depth=number)
        expected = formulas.adapter_saved(stack, adapter_of(method, DEEP)) + formulas.head_saved(stack)
        assert kept(method, replace(DEEP, blocks=tuple(range(4 - number, 4)))) == expected


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_of_the_first_blocks_keep_the_other_blocks_lower_bound(method):
    for number in (1, 3):
        stack = replace(cases.stack_of(DEEP), depth=number)
        one_more = formulas.lower_bound_saved(replace(stack, depth=2)) - formulas.lower_bound_saved(
            replace(stack, depth=1)
        )
        expected = formulas.adapter_saved(stack, adapter_of(method, DEEP)) + formulas.head_saved(stack)
        assert kept(method, replace(DEEP, blocks=tuple(range(number)))) == expected + (4 - number) * one_more


def test_the_figure_and_the_files_of_growing_memory(tmp_path, capsys):
    names = ["lower_bound", "full", "lora_fa", "lora"]
    assert run(tmp_path, *GRIDS, "--methods", *names) == 0
    output = capsys.readouterr()
    assert output.err == ""
    folder, device = tmp_path / "out", machine.file_name("cpu")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(files) == {f"growth_{device}.{kind}" for kind in ("csv", "json", "md", "png", "svg")}
    with (folder / f"growth_{device}.csv").open() as file:
        rows = list(csv.DictReader(file))
    totals = {(row["panel"], int(row["value"]), row["method"]): float(row["total_mib"]) for row in rows}
    assert {panel for panel, _, _ in totals} == {"rank", "first blocks", "last blocks", "resolution"}
    assert {method for _, _, method in totals} == {METHODS[name].label for name in names}
    assert totals["rank", 1, "LoRA"] < totals["rank", 8, "LoRA"]
    assert totals["rank", 1, "full fine-tuning"] == totals["rank", 8, "full fine-tuning"]
    assert totals["last blocks", 1, "LoRA-FA"] < totals["first blocks", 1, "LoRA-FA"]
    assert totals["first blocks", 2, "LoRA"] == totals["last blocks", 2, "LoRA"]
    assert all(
        totals["resolution", 32, METHODS[name].label] < totals["resolution", 48, METHODS[name].label] for name in names
    )
    assert all(row["batch_size"] == "6" for row in rows)
    assert main(["--redraw", str(folder)]) == 0
    assert (folder / f"growth_{device}.md").read_bytes() == files[f"growth_{device}.md"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--blocks", "3"], ["--blocks 3", "2 blocks", "test_vit"]),
        (["--ranks", "65"], ["--ranks 65", "64", "test_vit"]),
        (["--resolutions", "33"], ["resolution 33", "16 px"]),
        (["--methods", "lora_fx"], ["method", "'lora_fx'"]),
        (["--precision", "bf61"], ["precision", "'bf61'"]),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, capsys, options, named):
    assert run(tmp_path, *options) == 2
    assert_only_error(capsys.readouterr(), named)
    assert not (tmp_path / "out").exists()
