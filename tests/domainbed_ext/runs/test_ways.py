"""A run names the ways in which it computed, and keeps them where it resumes or is evaluated again."""

import importlib
import json
from dataclasses import replace

import pytest

from domainbed_ext import evaluate, train
from domainbed_ext.runs import checkpoint, training
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.system.interrupts import Interrupted
from vitlorafa import AdapterWarning, tuning, use_ways

attention, patches = (importlib.import_module(f"vitlorafa.ops.{name}") for name in ("attention", "patches"))
OTHER = {"attention": "matmuls 2 MiB", "evaluation_batch": "16"}


@pytest.fixture
def matmuls(monkeypatch):
    """Scores that are computed at a time, in each call of attention by matmuls."""
    calls, own = [], attention.attention_by_matmuls
    monkeypatch.setattr(
        attention, "attention_by_matmuls", lambda *a, scores, **k: calls.append(scores) or own(*a, scores=scores, **k)
    )
    return calls


@pytest.fixture
def interrupted(make_args, monkeypatch):
    """A run with other ways than this machine's, which was stopped before its second step."""

    def make(ways=OTHER, **overrides):
        args = make_args(steps=2, algorithm="BOnly", checkpoint_freq=1, evaluate="lean", **overrides)
        step = training.Training._step

        def stop(self, stream):
            if self.steps_done == 1:
                raise Interrupted("stopped")
            step(self, stream)

        with monkeypatch.context() as patch:
            patch.setattr(training.Training, "_step", stop)
            use_ways(ways)
            assert train.run(args) == 75
            use_ways({})
        return args

    return make


def kinds(ways):
    """By kind of question, how it was answered: in one way each."""
    answers = {(name.partition(":")[0], way) for name, way in ways.items()}
    assert len(dict(answers)) == len(answers)
    return dict(answers)


THEN = {**OTHER, "linear": "torch", "patches": "torch"}
NOW = {"attention": "torch", "linear": "torch", "patches": "torch"}


def test_a_run_that_resumes_keeps_its_ways(interrupted, matmuls, capsys):
    args = interrupted()
    assert set(matmuls) == {2**21}
    state, _ = checkpoint.load(RunFolder(args.output_dir).path)
    assert kinds(state["ways"]) == THEN and set(matmuls) == {2**21}
    matmuls.clear()
    assert train.run(args) == 0 and set(matmuls) == {2**21}
    assert "resumes after 1 of 2 steps" in capsys.readouterr().out
    first, last = RunFolder(args.output_dir).records()
    assert first["ways"] == last["ways"] and kinds(last["ways"]) == THEN


def test_a_run_that_starts_again_does_not(interrupted, matmuls, capsys):
    args = interrupted(hparams='{"lr": 0.01}')
    matmuls.clear()
    assert train.run(replace(args, hparams='{"lr": 0.02}')) == 0 and not matmuls
    assert "the checkpoint is of other arguments" in capsys.readouterr().err
    assert [kinds(record["ways"]) for record in RunFolder(args.output_dir).records()] == [NOW, NOW]


def test_an_evaluation_has_the_ways_of_the_run(make_args, matmuls):
    args = make_args(steps=1, algorithm="LP")
    use_ways(OTHER)
    train.run(args)
    use_ways({})
    matmuls.clear()
    _, reproduced = evaluate.evaluate(RunFolder(args.output_dir))
    assert set(matmuls) == {2**21} and kinds(tuning.answers()) == THEN
    assert all(each.same for each in reproduced)


def change(folder, ways):
    """Writes other ways into the records; None for none, as records were before they named any."""
    path = folder.path / "results.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["ways"]
    path.write_text("".join(json.dumps(record | ({} if ways is None else {"ways": ways})) + "\n" for record in records))


def test_records_that_name_no_ways_are_evaluated_in_batches_of_64(make_args):
    args = make_args(steps=1, algorithm="LP")
    train.run(args)
    folder = RunFolder(args.output_dir)
    assert kinds(folder.records()[-1]["ways"]) == NOW
    change(folder, None)
    use_ways({"evaluation_batch": "16"})
    _, reproduced = evaluate.evaluate(folder)
    assert kinds(tuning.answers()) == NOW and all(each.same for each in reproduced)
    assert train.run(args) == 0  # done already


def test_records_from_before_a_question_are_evaluated_in_torchs_way(make_args, monkeypatch):
    multiplied = []
    multiply = patches._multiply
    monkeypatch.setattr(patches, "_multiply", lambda *inputs: multiplied.append(1) or multiply(*inputs))
    args = make_args(steps=1, algorithm="LP")
    train.run(args)
    folder = RunFolder(args.output_dir)
    change(folder, {"attention": "torch"})
    use_ways({"patches": "matmul"})
    assert all(each.same for each in evaluate.evaluate(folder)[1]) and not multiplied
    train.run(make_args(steps=1, algorithm="LP", output_dir=f"{args.output_dir}_again"))
    assert multiplied  # a new run asks


def test_ways_that_are_not_here_are_torchs_with_a_warning(make_args):
    args = make_args(steps=1, algorithm="LP")
    train.run(args)
    folder = RunFolder(args.output_dir)
    change(folder, {"attention": "on the moon"})
    with pytest.warns(AdapterWarning, match="there is no way 'on the moon' here, only torch, .*: torch is used"):
        _, reproduced = evaluate.evaluate(folder)
    assert all(each.same for each in reproduced)
