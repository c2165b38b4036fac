import ast
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import domainbed_ext
from domainbed_ext import divergence, evaluate, train
from domainbed_ext.algorithms.probe import LP
from domainbed_ext.collect_results import main as collect_results
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import accuracy, best_step
from domainbed_ext.runs import arguments as options
from domainbed_ext.runs import checkpoint, training
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep import status_view
from domainbed_ext.system import strict_json
from domainbed_ext.system.interrupts import Interrupted
from tests.domainbed_ext import run_states as standing
from tests.domainbed_ext.fabricated_records import paper_like
from tests.domainbed_ext.fabricated_records import write_runs as write_single_source
from tests.domainbed_ext.test_collect_results import named, run_records, write

PACKAGE = Path(domainbed_ext.__file__).parent
# What makes words of a command line, not files.
WORDS = (
    "system/strict_json.py",
    "system/option_file.py",
    "runs/hparams_option.py",
    "bench/accuracy.py",
    "bench/runs.py",
    "bench/__main__.py",
)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def strictly(text):
    return json.loads(text, parse_constant=refuse)


def strict_records(folder):
    return [strictly(line) for line in (folder.path / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def diverging(monkeypatch):
    """Lets the loss of LP be NaN from a step on."""

    def at(step, value=math.nan):
        update, steps = LP.update, iter(range(10**6))

        def diverge(self, *args):
            values = update(self, *args)
            return {"loss": value} if next(steps) >= step else values

        monkeypatch.setattr(LP, "update", diverge)

    return at


def run(args):
    return RunFolder(args.output_dir), train.run(args, lambda share: None)


def args_of(make_args, **more):
    return make_args(**{"algorithm": "LP", "steps": 6, "checkpoint_freq": 2, "hparams": '{"batch_size": 4}', **more})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null_with_a_flag_and_warned_of_once(make_args, diverging, capsys, value):
    diverging(3, value)
    folder, code = run(args_of(make_args))
    records = strict_records(folder)
    assert (code, folder.state) == (0, State.DONE)
    assert [record["step"] for record in records] == [0, 2, 4, 5]
    assert [record.get("diverged") for record in records] == [None, None, True, True]
    assert [record.get("first_nonfinite_step") for record in records] == [None, None, 3, 3]
    assert [record["loss"] is None for record in records] == [False, False, True, True]
    said = capsys.readouterr()
    assert said.err.count("warning: the run diverged at step 3: loss is") == 1
    assert "(the run diverged), selected by training-domain validation" in said.out
    assert (folder.path / "err.txt").read_text().count("--stop_on_nan") == 1


def test_a_model_whose_outputs_are_not_finite_classifies_nothing(make_args, monkeypatch):
    update, steps = LP.update, iter(range(100))

    def break_the_head(self, *args):
        values = update(self, *args)  # its loss is finite
        if next(steps) == 3:
            with torch.no_grad():
                self.backbone.get_classifier().bias[1] = math.nan
        return values

    monkeypatch.setattr(LP, "update", break_the_head)
    folder, _ = run(args_of(make_args, steps=4))
    before, last = strict_records(folder)[-2:]
    names = [name for name in last if name.endswith("_acc")]
    assert len(names) == 8 and all(last[name] is None for name in names)
    assert all(before[name] > 0 for name in before if name.endswith("_acc"))
    assert last["loss"] is not None and last["first_nonfinite_step"] == 3
    records = folder.records()
    assert math.isnan(accuracy(records[-1], 1, "out")) and best_step(records)["step"] < 3
    record, reproduced = evaluate.evaluate(folder, "last")
    assert all(math.isnan(each.now) for each in reproduced) and not evaluate.describe_difference(record, reproduced)


def test_infinite_logits_of_classes_that_are_ruled_out_are_no_divergence(make_args, monkeypatch):
    predict = LP.predict

    def rule_out(self, images):
        logits = predict(self, images)
        logits[:, 9] = -math.inf
        return logits

    monkeypatch.setattr(LP, "predict", rule_out)
    folder, _ = run(args_of(make_args, steps=1))
    assert "diverged" not in strict_records(folder)[0]


def test_a_run_told_to_stop_ends_as_failed_and_names_the_step(make_args, diverging, capsys):
    diverging(3)
    folder, code = run(args_of(make_args, stop_on_nan=True))
    assert (code, folder.state) == (1, State.FAILED)
    assert "the run diverged at step 3: loss is nan" in folder.failure()
    assert "Traceback" not in (folder.path / "err.txt").read_text()
    assert [record["step"] for record in strict_records(folder)] == [0, 2]


def test_outputs_that_are_not_finite_stop_a_run_too(make_args, monkeypatch):
    predict = LP.predict
    monkeypatch.setattr(LP, "predict", lambda self, images: predict(self, images) * math.nan)
    folder, code = run(args_of(make_args, stop_on_nan=True))
    assert (code, folder.state) == (1, State.FAILED)
    assert "diverged at step 0: env1_out_acc is nan" in folder.failure()


def test_a_run_that_diverged_resumes_as_such(make_args, diverging, monkeypatch):
    diverging(1)
    step = training.Training._step

    def interrupted_at_3(self, stream):
        if self.steps_done == 3:
            raise Interrupted("stopped")
        step(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_step", interrupted_at_3)
        folder, code = run(args_of(make_args))
    assert code == 75 and folder.diverged
    (path,) = folder.path.glob("checkpoint_*")
    state, _ = checkpoint.load(folder.path)
    assert state["diverged"] == 1 and path.exists()
    folder, code = run(args_of(make_args))
    assert code == 0 and folder.diverged
    assert [record.get("first_nonfinite_step") for record in strict_records(folder)] == [None, 1, 1, 1]


def test_a_run_that_diverged_does_not_resume_if_told_to_stop(make_args, diverging, monkeypatch):
    diverging(1)
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_save_if_due", lambda self: (_ for _ in ()).throw(Interrupted("stopped")))
        run(args_of(make_args, hparams='{"batch_size": 4}'))
        run(args_of(make_args, hparams='{"batch_size": 4}'))
    folder, code = run(args_of(make_args, stop_on_nan=True))
    assert (code, folder.state) == (1, State.FAILED)
    assert "diverged at step 1" in folder.failure()


def test_a_checkpoint_holds_numbers_that_are_not_finite_as_json(tmp_path):
    state = {"losses": [1.5, math.nan, math.inf, -math.inf], "array": np.array([math.nan, 1.0])}
    checkpoint.save(tmp_path, 1, state)
    from safetensors import safe_open

    (path,) = tmp_path.glob("checkpoint_*")
    with safe_open(path, "pt") as file:
        strictly(file.metadata()["state"])
    found, _ = checkpoint.load(tmp_path)
    np.testing.assert_array_equal(found["losses"], state["losses"])
    np.testing.assert_array_equal(found["array"], state["array"])


def test_stop_on_nan_goes_to_each_run_of_a_sweep_and_is_no_part_of_its_identity(tmp_path):
    plain, stopping = standing.make_jobs(tmp_path), standing.make_jobs(tmp_path, "--stop_on_nan")
    assert [job.name for job in plain] == [job.name for job in stopping]
    assert all("--stop_on_nan" in job.argv and job.args.stop_on_nan for job in stopping)
    assert "stop_on_nan" in options.PLACES


def test_status_counts_runs_that_diverged(tmp_path, capsys):
    jobs = standing.make_jobs(tmp_path)
    for job in jobs[:3]:
        standing.done(job)
    jobs[1].folder.diverge(7)
    report = strictly(status_view.as_json(standing.look(jobs), jobs[0].sweep_dir))
    assert report["diverged"] == 1
    assert [each["diverged"] for each in report["runs"]] == [False, True, False, False]
    sweep.main(standing.words(tmp_path, command="status"))
    assert "1 run diverged" in capsys.readouterr().out


def diverged_runs():
    """BOnly, of which one of six diverged after step 0; LP, all of whose runs did, written as upstream does."""
    runs = {}
    for trial in range(2):
        for env in range(3):
            runs[f"b{trial}{env}"] = run_records("BOnly", env, trial, 0.5)
            runs[f"l{trial}{env}"] = run_records("LP", env, trial, math.nan, math.nan, extra={"loss": math.nan})
    last = runs["b11"][-1]
    last |= {name: None for name in last if name.endswith("_acc")}
    last |= {"loss": None, "diverged": True, "first_nonfinite_step": 4}
    return runs


def test_tables_and_page_count_runs_that_diverged(tmp_path, capsys):
    folder = write(tmp_path / "sweep", diverged_runs())
    assert collect_results(["--input_dir", str(folder)]) == 0
    sentence = "Diverged: BOnly (1 of 6 runs), LP (6 of 6 runs)"
    assert sentence in " ".join(capsys.readouterr().out.split())
    tables = folder / "tables"
    for name in ("results.txt", "results.md", "results.tex", "index.html"):
        text = " ".join((tables / name).read_text().split())
        assert sentence in text.replace("\\", ""), name
        assert "7 diverged" in text or name in ("results.tex", "results.md")
        assert " nan" not in text.lower(), name
    assert "at step 4" in (tables / "index.html").read_text()
    with (tables / "results.csv").open() as file:
        counts = {row["algorithm"]: row["diverged"] for row in csv.DictReader(file)}
    assert counts == {"BOnly": "1", "LP": "6"}
    with (tables / "selected.csv").open() as file:
        steps = {(row["run"], row["step"]) for row in csv.DictReader(file) if row["selection"] == "training-domain"}
    assert ("b11", "0") in steps  # ranked last, as NaN is
    rows = (tables / "results.txt").read_text().splitlines()
    assert any(row.lstrip().startswith("LP ") and row.count("diverged") == 4 for row in rows)


def test_single_source_tables_count_them_too(tmp_path):
    records = paper_like(trials=2)
    for record in records:
        if record["run"] == "PACS-LP-1-0":
            record |= {"loss": math.nan, **{name: math.nan for name in record if name.endswith("_acc")}}
    folder = write_single_source(tmp_path / "sweep", records)
    assert collect_results(["--input_dir", str(folder), "--paper"]) == 0
    assert "Diverged: LP (1 of 2 runs)" in (folder / "tables" / "results.md").read_text()


def test_null_is_read_as_nan_and_what_is_not_there_is_still_an_error():
    (record,) = named({"x": run_records("LP", 0, 0, 0.5)[-1:]})
    assert math.isnan(accuracy({**record, "env1_in_acc": None}, 1, "in"))
    del record["env1_in_acc"]
    with pytest.raises(BenchmarkError, match="has no number env1_in_acc"):
        accuracy(record, 1, "in")


def test_records_of_upstream_are_told_by_their_nan():
    assert divergence.is_diverged({"loss": math.nan}) and divergence.is_diverged({"penalty": math.inf})
    assert not divergence.is_diverged({"loss": 1.0, "weights_digest": None, "step": 3})


def test_json_is_strict():
    value = {"a": [math.nan, (math.inf, 1.0)], "b": {"c": -math.inf}, "d": True, "e": np.float64("nan")}
    assert strictly(strict_json.dumps(value)) == {"a": [None, [None, 1.0]], "b": {"c": None}, "d": True, "e": None}


def test_every_writer_of_json_is_strict():
    lax = []
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump"):
                lax.append(place)
    assert set(lax) <= set(WORDS)
