"""What the README shows is what was measured, and what it tells people to run is there."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["quickstart", "pacs_loo_vit_tiny", "pacs_cartoon_vit_tiny"])
def test_its_tables_are_the_measured_ones(name):
    shown = README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    measured = (ROOT / "results" / name / "results.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) >= 7
    assert [row for row in rows if row not in measured] == []


def test_its_costs_are_the_measured_ones():
    def measured(what, key, value):
        (path,) = (ROOT / "results" / "bench").glob(f"{what}_*.csv")
        with path.open(encoding="utf-8") as file:
            return {(row["method"], float(row[key])): float(row[value]) for row in csv.DictReader(file)}

    steps, kept = measured("step", "rank", "ratio_to_lower_bound"), measured("memory", "dropout", "kept_mib")
    shown = README.split("<!-- bench -->")[1].split("<!-- /bench -->")[0]
    numbers = [[float(n) for n in re.findall(r"([0-9.]+) (?:×|MiB)", line)] for line in shown.splitlines()]
    methods = ["lower bound", "LoRA-FA", "LoRA-FA (plain PyTorch)", "PEFT LoRA-FA", "PEFT LoRA"]
    with_dropout = ["lower bound", "LoRA-FA (separate)", *methods[2:]]
    assert [row for row in numbers if row] == [
        [round(steps[one, 8], 2), round(steps[one, 64], 2), round(kept[one, 0]), round(kept[other, 0.1])]
        for one, other in zip(methods, with_dropout, strict=True)
    ]


def test_its_speeds_are_the_measured_ones():
    def measured(what, way, column):
        (path,) = (ROOT / "results" / "bench").glob(f"{what}_*.csv")
        with path.open(encoding="utf-8") as file:
            return next(float(row[column]) for row in csv.DictReader(file) if row["way"] == way)

    text = " ".join(README.split())
    assert f"at {measured('stages', 'ours: read, augment, normalise', '× plain'):.1f} × the rate of PIL" in text
    assert f"is {measured('run_upstream_fullft', 'defaults', '× upstream'):.1f} × as fast as upstream's" in text
    assert f"one of linear probing {measured('run_upstream_lp', 'defaults', '× upstream'):.1f} ×" in text


def test_its_pictures_and_make_targets_exist():
    pictures = re.findall(r"!\[[^]]*]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"quickstart", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_its_five_lines_adapt_a_model(tmp_path):
    code = README.split("```python\n")[1].split("```")[0]
    code = code.replace("pretrained=True", "pretrained=False").replace("vit_small_patch16_224", "test_vit")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert {path.suffix for path in (tmp_path / "my_adapter").iterdir()} == {".json", ".safetensors"}
