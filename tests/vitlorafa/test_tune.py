"""The command that shows the fastest ways of a machine."""

import importlib
import json

import pytest
import torch

from vitlorafa import tuning
from vitlorafa.bench.__main__ import main
from vitlorafa.kept_ways import machine_file

attention = importlib.import_module("vitlorafa.ops.attention")
SMALL = ["--model", "vit_tiny_patch16_224", "--depth", "1", "--batch_size", "20", "--resolution", "96"]
COMMAND = ["tune", *SMALL, "--threads", "1", "--precision", "float32"]


def test_it_asks_what_is_missing_and_shows_all(clock, capsys, monkeypatch):
    own, calls = attention._compute, []

    def compute(way, *args):
        calls.append(way)
        clock.now += 0.004 if way == "torch" else 0.001
        return own(way, *args)

    monkeypatch.setattr(attention, "_compute", compute)
    assert main(COMMAND) == 0
    printed = capsys.readouterr().out
    question = "attention: float32, forward and backward, 16 images, 3 heads of 64, 1 x 37 tokens, 1 thread"
    assert f"| {question} | matmuls 1 MiB | torch 1.00, matmuls 1 MiB 0.40, matmuls 2 MiB 0.40 |" in printed
    assert all(f"| {kind}: float32, " in printed for kind in ("attention", "linear"))
    assert "| 1 | float32 | " in printed and str(machine_file().path) in printed
    assert "torch" in calls
    calls.clear()
    assert main(COMMAND) == 0 and "torch" not in calls  # nothing is timed again
    assert question in capsys.readouterr().out
    token = tuning.identity()["token"]
    assert main([*COMMAND, "--again"]) == 0 and "torch" in calls and tuning.identity()["token"] != token
    assert torch.get_num_threads() == 1


def test_a_model_that_is_too_small_is_told(clock, capsys):
    small = ["--model", "test_vit", "--resolution", "32", "--batch_size", "1", "--rank", "2", "--threads", "1"]
    assert main(["tune", *small, "--precision", "bf16"]) == 0
    assert "Nothing of this model is large enough to be timed." in capsys.readouterr().out


def test_every_number_of_threads_has_questions_of_its_own(clock, capsys):
    assert main([*COMMAND[:-4], "--threads", "1", "2"]) == 0
    kept = json.loads(machine_file().path.read_text(encoding="utf-8"))["answers"]
    assert {name.rpartition(", ")[2] for name in kept if name.startswith("linear")} == {"1 thread", "2 threads"}
    assert "precision: matmuls" in kept and "| 2 | " in capsys.readouterr().out
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--precision", "fp8"], "unknown precision 'fp8': choose from auto, bf16, float32"),
        (["--model", "vit_tiny_patch16_242"], "unknown model 'vit_tiny_patch16_242': did you mean"),
        (["--modell", "a"], "see python -m vitlorafa.bench tune --help"),
    ],
)
def test_bad_input_gets_one_sentence(clock, capsys, options, said):
    assert main(["tune", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and said in printed.err and printed.err.count("\n") == 1


def test_it_says_that_timing_is_off(monkeypatch, capsys):
    monkeypatch.setenv("VITLORAFA_TUNE", "off")
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "error: VITLORAFA_TUNE is off, so nothing is timed: unset it\n"


def test_help_names_all_questions(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in tuning.KINDS)
