"""`bench card`: its parts run one after the other, whatever happens to one, and the report tells."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from domainbed_ext.bench import __main__ as bench
from domainbed_ext.bench import card, card_findings, card_parts, questions, report
from domainbed_ext.bench.card_findings import Findings
from domainbed_ext.bench.card_parts import Command, Part
from domainbed_ext.bench.invented_data import CLASSES, invent_data
from domainbed_ext.datasets.folders import PACS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.sweep.arguments import parse as parse_sweep
from vitlorafa.bench import grid, kernels
from vitlorafa.bench.methods import find_method


def part(name, code, seconds=60, read=lambda folder, text: Findings()):
    return Part(name, f"what {name} answers", seconds, (Command(("-c", code)),), read)


@pytest.fixture
def parts(monkeypatch):
    """Lets the command have these parts alone."""

    def use(*parts):
        monkeypatch.setattr(card, "PARTS", {each.name: lambda plan, each=each: each for each in parts})
        return list(card.PARTS)

    return use


def run(tmp_path, names, *words):
    args = bench.make_parser().parse_args(["card", "--rehearse", "--output_dir", str(tmp_path), *words])
    args.parts = names
    card.measure(args, tmp_path)


def statuses(tmp_path):
    return {each["name"]: each["status"] for each in json.loads((tmp_path / "card.json").read_text())["parts"]}


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(card, "_GRACE", 0.2)
    monkeypatch.setattr(card, "_TICK", 0.1)
    names = parts(
        part("hanging", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)", seconds=0.5),
        part("broken", "print('so far'); raise SystemExit(3)"),
        part("unreadable", "pass", read=lambda folder, text: Findings({"rows": [{"n": text["no"]}]})),
        part("good", "print('needs a card: speed')", read=lambda folder, text: Findings({"rows": [{"n": 1}]})),
    )
    with pytest.raises(BenchmarkError) as error:
        run(tmp_path, names)
    assert str(error.value).startswith(
        "3 of 4 parts did not finish: hanging (over its limit), broken (failed), unreadable (failed); see "
    )
    assert statuses(tmp_path) == {
        "broken": "failed",
        "hanging": "over its limit",
        "unreadable": "failed",
        "good": "finished",
    }
    page, printed = (tmp_path / "card.md").read_text(), capsys.readouterr().out
    assert "# Rehearsal on the CPU: no measurement of a GPU" in page
    assert (
        "exit code 3 of python -c" in page and "cannot be read (TypeError" in page and "| n |\n| --- |\n| 1 |" in page
    )
    assert (
        re.search(r"2 of 4  broken: what broken answers \(at most 60 s\)", printed) and "needs a card: speed" in printed
    )
    (limit,) = re.findall(r"4 of 4  good: what good answers \(at most (\d+) s\)", printed)
    assert 60 < int(limit) <= 180  # with what the others left
    assert "so far" in (tmp_path / "card_broken.log").read_text()
    assert len(list(tmp_path.iterdir())) == 6


def test_what_there_is_no_time_for_is_left_out(parts, tmp_path):
    with pytest.raises(BenchmarkError, match=r"1 of 1 parts did not finish: late \(left out\)"):
        run(tmp_path, parts(part("late", "pass")), "--minutes", "0")
    assert statuses(tmp_path) == {"late": "left out"} and not (tmp_path / "card_late.log").exists()


def test_parts_have_the_checkout_and_in_a_rehearsal_no_gpu(parts, tmp_path):
    code = "import os, domainbed_ext; print('gpus', repr(os.environ['CUDA_VISIBLE_DEVICES']), domainbed_ext.__file__)"
    run(tmp_path, parts(part("where", code)))
    log = (tmp_path / "card_where.log").read_text()
    assert f"gpus '' {card_parts.ROOT / 'domainbed_ext' / '__init__.py'}" in log and log.startswith("$ python -c")


def test_without_a_gpu_it_offers_the_rehearsal(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchmarkError, match="torch sees no GPU here: --rehearse"):
        bench.main(["card", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("rehearse", [False, True])
def test_parts_fit_into_nine_minutes_and_eight_files(tmp_path, rehearse):
    made = [make(card_parts.Plan(rehearse, "data", tmp_path)) for make in card.PARTS.values()]
    assert [each.name for each in made] == list(card.PARTS) and len(made) + 2 <= 8
    assert sum(each.seconds for each in made) <= 60 * 8.9
    for each in (command for part in made for command in part.commands):
        # What a GPU is needed for must not fail by a wrong option.
        if each.words[1] == "domainbed_ext.bench":
            bench.make_parser().parse_args(each.words[2:])
        elif each.words[1] == "vitlorafa.bench":
            args = grid.make_parser().parse_args(each.words[2:])
            assert len([find_method(name) for name in args.methods]) >= 3 and args.what
        elif each.words[1] == "domainbed_ext.sweep":
            assert parse_sweep(each.words[2:]).steps == (2 if rehearse else 120)
    tests = [word for word in made[0].commands[0].words if word.endswith(".py")]
    assert {"tests/domainbed_ext/test_on_device.py", "tests/vitlorafa/test_on_device.py"} <= {*tests}
    assert ("tests/vitlorafa/test_triton.py" in tests) is not rehearse and all(
        (card_parts.ROOT / name).is_file() for name in tests
    )


def test_tests_are_counted_and_those_that_failed_are_named(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two">'
        '<failure message="AssertionError: 1&#10;more"/></testcase><testcase classname="a" name="three">'
        '<skipped message="needs a CUDA device"/></testcase></testsuite></testsuites>'
    )
    found = card_findings.read_tests(tmp_path, "")
    assert found.tables["tests"] == [{"passed": 1, "failed": 1, "skipped": 1}]
    assert found.tables["failed tests"] == [{"test": "a::two", "error": "AssertionError: 1"}]
    assert found.needs_card == ["1 tests"]


def test_tests_that_were_stopped_are_read_from_their_log(tmp_path):
    found = card_findings.read_tests(
        tmp_path,
        "[gw1] [  3%] PASSED tests/a.py::one[cuda]\n[gw0] [  6%] FAILED tests/a.py::two\n"
        "tests/a.py::three SKIPPED (needs a CUDA device) [ 9%]\ntests/a.py::four PASSED [ 12%]\n! Interrupted !\n",
    )
    assert found.tables["tests that ended"] == [{"passed": 2, "failed": 1, "skipped": 1}]
    assert found.tables["failed tests"] == [{"test": "tests/a.py::two"}] and found.failures


def test_the_quickstart_is_compared_with_the_committed_one(tmp_path):
    there = card_findings._committed().read_text()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "results.csv").write_text(there)
    same = card_findings.read_quickstart(tmp_path, "")
    (rows,) = same.tables.values()
    assert not same.failures and len(rows) == 10 and {row["within"] for row in rows} == {"yes"}
    (tmp_path / "tables" / "results.csv").write_text(there.replace("out_of_domain,Avg,58.9", "out_of_domain,Avg,48.9"))
    assert card_findings.read_quickstart(tmp_path, "").failures == [
        "1 accuracies of the quickstart differ from the CPU's by more than noise"
    ]


def test_steps_have_their_share_of_the_matmul_rate(tmp_path):
    (tmp_path / "questions_x.csv").write_text("question,variant,value\nrate,bf16,500\n")
    names = "model,rank,dropout,method,step_ms,ratio_to_lower_bound,images_per_s,gflop_per_s"
    (tmp_path / "step_x.csv").write_text(f"{names}\nvit,8,0,LoRA-FA,10,1.1,100,250000\nvit,8,0,VeRA,10,1.1,100,\n")
    rows = card_findings.read_steps(tmp_path, "").tables["step_x"]
    assert [row["of the matmul rate"] for row in rows] == ["0.50", None]


def test_the_whole_run_has_bars(tmp_path):
    (tmp_path / "run_cuda_x.csv").write_text('steps,"seconds, start to end","data wait, %"\n2500,50,7\n')
    bars = card_findings.read_runs(tmp_path, "").tables["bars of the whole run"]
    assert [row["met"] for row in bars] == ["yes", "no"]


def test_invented_images_are_a_pacs(tmp_path):
    dataset = PACS(invent_data(tmp_path, 2, side=40), [], {})
    assert [len(each) for each in dataset.datasets] == [2 * len(CLASSES)] * 4
    first = (tmp_path / "PACS" / "photo" / "dog" / "000.jpg").read_bytes()
    invent_data(tmp_path, 2, side=40)
    assert (tmp_path / "PACS" / "photo" / "dog" / "000.jpg").read_bytes() == first


class CompilationError(Exception):
    """Triton's is no error that Python has."""


def test_questions_are_asked_one_by_one(tmp_path, monkeypatch, capsys):
    def fail(args):
        yield questions._row("a case", "a variant", 1.0, "ms", 1.0)
        raise CompilationError("no such kernel\nmore")

    monkeypatch.setitem(questions.QUESTIONS, "values", fail)
    words = ["--backbones", "vit_pico_patch8_32", "--image_size", "32", "--batch_size", "2", "--rounds", "1"]
    monkeypatch.setattr(report, "device", lambda: "cpu")
    monkeypatch.setattr(questions, "STEPS", 1)
    bench.main(["questions", "--ask", "values", "determinism", "backend", *words, "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("questions_*.md")
    page, printed = path.read_text(), capsys.readouterr().out
    assert "| values | a case | a variant | 1 | ms | 1.000 |" in page and "CompilationError: no such kernel" in page
    assert "| determinism | vit_pico_patch8_32 | deterministic |" in page
    assert "needs a card: question backend" in printed and "backend" not in page
    assert set(questions.NEED_A_CARD) < set(questions.QUESTIONS) and sys.modules[questions.__name__] is questions


def test_a_part_that_cannot_be_made_does_not_stop_the_next(monkeypatch, tmp_path):
    monkeypatch.setattr(card_parts, "ROOT", tmp_path)
    monkeypatch.setattr(card, "PARTS", {"tests": card_parts.plan_tests, "good": lambda plan: part("good", "pass")})
    with pytest.raises(BenchmarkError, match=r"1 of 2 parts did not finish: tests \(failed\)"):
        run(tmp_path, ["tests", "good"])
    assert statuses(tmp_path)["good"] == "finished" and "no tests of a GPU in" in (tmp_path / "card.md").read_text()


class Graph:
    def __init__(self, compute):
        self.replay = compute


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("name", [*questions.NEED_A_CARD, "transfers", "evaluation"])
def test_questions_for_a_gpu_have_no_other_fault_on_a_cpu(monkeypatch, name):
    monkeypatch.setattr(questions, "STEPS", 1)
    monkeypatch.setattr(questions, "_captured", lambda algorithm, compute: Graph(compute))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    for function, value in (("empty_cache", None), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, function, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * 2**30)
    asked = {kernel: [] for kernel in ("project", "add_update", "backward_g", "grad_A")}
    tiles = SimpleNamespace(
        **{kernel: lambda *args, kernel=kernel: asked[kernel].append(kernels.kernels.BLOCK_N) for kernel in asked},
        **{"BLOCK_N": 64, "BLOCK_N_ONCE": 128, "WARPS": 4, "STAGES": 2},
    )
    monkeypatch.setattr(kernels, "kernels", tiles)
    args = SimpleNamespace(backbones=["vit_pico_patch8_32"], image_size=32, batch_size=2, rounds=1)
    rows = list(questions.QUESTIONS[name](args))
    assert rows and all(float(row["value"]) >= 0 and row["unit"] in ("ms", "GiB") for row in rows)
    if name == "memory":
        assert [row["× first variant"] for row in rows] == [None, "1.500"]
    if name == "tiles":
        assert len(rows) == 24 and {*asked["grad_A"]} == {64, 128} and tiles.BLOCK_N == 64
