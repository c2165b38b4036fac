"""Runs with an average: it is what is evaluated, recorded, saved and reproduced, however often the run was stopped."""

import json

import numpy as np
import pytest
import torch

from domainbed_ext import train
from domainbed_ext.evaluate import evaluate
from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.setup import set_up
from domainbed_ext.runs.training import Training
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import Interrupted
from tests.domainbed_ext import fault_injection as faults

STEPS = 12
SMALL = {"lr": 0.01, "batch_size": 4}
MA = {**SMALL, "average": "ma", "ma_start": 3}
SWAD = {**SMALL, "average": "swad", "swad_overfit_patience": 4}
RESNET = {"backbone": "test_resnet", "weights": "none"}
# By step; the lowest of three is that of step 4, and the threshold is 0.65 for a tolerance of 1.3.
VALLEY = {0: 2.0, 2: 0.6, 4: 0.4, 6: 0.5, 8: 0.6, 10: 0.9, 11: 0.9}
FALLING = {step: 2.0 - 0.1 * step for step in VALLEY}
LEFT = {**VALLEY, 6: 0.5, 8: 0.6, 10: 0.9, 12: 0.9, 14: 0.9, 16: 0.9}

pytestmark = pytest.mark.usefixtures("few_evaluated")


@pytest.fixture
def make_run(make_args, tmp_path):
    def make(name="run", hparams=MA, code=ExitCode.DONE, **overrides):
        values = {"steps": STEPS, "checkpoint_freq": 2, "save_model_every_checkpoint": True, "algorithm": "BA"}
        values |= {**overrides, "hparams": json.dumps(hparams), "output_dir": str(tmp_path / name)}
        assert train.run(make_args(**values)) == code
        return RunFolder(tmp_path / name)

    return make


@pytest.fixture
def visited(monkeypatch):
    """The trained tensors after each step, by name."""
    steps = {}
    step = Training._step

    def note(self, stream):
        step(self, stream)
        tensors = self.algorithm.state_dict()
        trained = {name for name, each in self.algorithm.named_parameters() if each.requires_grad}
        statistics = {name for name in tensors if name.endswith(("running_mean", "running_var"))}
        steps[self.steps_done - 1] = {name: tensors[name].clone() for name in sorted(trained | statistics)}

    monkeypatch.setattr(Training, "_step", note)
    return steps


@pytest.fixture
def follow(monkeypatch):
    """Lets validation losses be those of a curve."""

    def follow(curve):
        monkeypatch.setattr(Feed, "losses", lambda self, step, names: {f"{name}_loss": curve[step] for name in names})

    return follow


def loaded(folder, step):
    """What a run saved after a step, by its names in the algorithm."""
    record = next(record for record in folder.records() if record["step"] == step)
    setup = set_up(RunArguments.from_mapping(record["args"]))
    algorithm = setup.make_algorithm()
    algorithm.load(folder.path / f"step_{step}")
    return algorithm.state_dict()


def assert_mean(saved, visited, steps):
    """What was saved is the mean of what was visited after some steps."""
    assert set(steps) <= set(visited)
    for name in visited[0]:
        expected = torch.stack([visited[step][name].double() for step in steps]).mean(0)
        assert torch.allclose(saved[name].double(), expected, rtol=1e-6, atol=1e-8), name
        last = visited[max(visited)][name].double()
        assert torch.equal(expected, last) or not torch.allclose(saved[name].double(), last, rtol=1e-6, atol=1e-8)


def averages(folder):
    return {record["step"]: record.get("average") for record in folder.records()}


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "BA"},
        {"algorithm": "LP"},
        {"algorithm": "FullFT", **RESNET, "hparams": {**MA, "image_size": 32}},
        {"algorithm": "BOnly+CORAL"},
    ],
    ids=lambda options: options["algorithm"],
)
def test_a_moving_average_is_the_mean_of_all_weights_from_its_start(make_run, visited, options):
    folder = make_run(**options)
    assert averages(folder)[2] == {"start": None, "end": None, "steps": 0}
    assert averages(folder)[10] == {"start": 3, "end": 10, "steps": 8}
    assert averages(folder)[11] == {"start": 3, "end": 11, "steps": 9}
    assert_mean(loaded(folder, 10), visited, range(3, 11))
    assert_mean(loaded(folder, 11), visited, range(3, 12))
    before = loaded(folder, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in visited[2].items())


def test_training_does_not_depend_on_its_average(make_run, capsys):
    losses = [
        [record["loss"] for record in make_run(str(number), hparams).records()]
        for number, hparams in enumerate((SMALL, MA))
    ]
    assert losses[0] == losses[1]
    assert "averaged the weights of 9 steps, from 3 to 11" in capsys.readouterr().out


def test_a_run_without_an_average_says_nothing_of_it(make_run):
    assert set(averages(make_run(hparams=SMALL)).values()) == {None}


@pytest.mark.parametrize(
    ("algorithm", "hparams"),
    [
        ("BA", MA),
        ("BA", SWAD),
        ("Peft@method=adalora", MA),
        ("Peft@method=vera", MA),
        ("Peft@method=pissa", SWAD),
    ],
)
def test_evaluate_reproduces_the_record(make_run, follow, algorithm, hparams):
    follow(VALLEY)
    folder = make_run(algorithm=algorithm, hparams={**hparams, "ma_start": 0}, save_model_every_checkpoint=False)
    for step in ("best", "last") if hparams is MA else ("last",):
        record, reproduced = evaluate(folder, step)
        assert record["average"]["steps"] == (6 if hparams is SWAD else record["step"] + 1)
        assert len(reproduced) == 8 and all(each.same for each in reproduced)


def test_lean_evaluation_keeps_the_average_of_the_selected_step(make_run, monkeypatch):
    faults.select_step(6, monkeypatch.setattr)
    whole, lean = make_run("all", evaluate="all"), make_run("lean", evaluate="lean")
    accuracies = [
        {name: value for name, value in record.items() if name.endswith("_acc")}
        for folder in (whole, lean)
        for record in folder.records()
        if record["step"] == 6
    ]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 8
    saved = [
        {path.relative_to(folder.path): path.read_bytes() for path in sorted(folder.path.glob("*/*.safetensors"))}
        for folder in (whole, lean)
    ]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("algorithm", ["BA", "LP"])
def test_swad_averages_all_steps_of_the_valley_and_has_one_record(make_run, visited, follow, algorithm, capsys):
    follow(VALLEY)
    folder = make_run(algorithm=algorithm, hparams=SWAD)
    (record,) = folder.records()
    assert record["step"] == STEPS - 1 and sum(name.endswith("_acc") for name in record) == 8
    losses = record["average"]["validation_losses"]
    assert [step for step, _ in losses] == list(VALLEY)
    assert [loss for _, loss in losses] == pytest.approx(list(VALLEY.values()))
    assert record["average"]["threshold"] == pytest.approx(0.65)
    assert {name: record["average"][name] for name in ("converged", "start", "end", "steps")} == {
        "converged": True,
        "start": 3,
        "end": 8,
        "steps": 6,
    }
    assert_mean(loaded(folder, STEPS - 1), visited, range(3, 9))
    assert "averaged the weights of 6 steps, from 3 to 8" in capsys.readouterr().out


def test_swad_leaves_out_the_steps_after_the_valley(make_run, visited, follow):
    follow(LEFT)
    folder = make_run(hparams=SWAD, steps=40)
    (record,) = folder.records()
    assert max(visited) == 16 and record["step"] == 39
    assert (record["average"]["start"], record["average"]["end"]) == (3, 8)
    assert_mean(loaded(folder, 39), visited, range(3, 9))


def test_swad_that_has_not_converged_has_the_last_weights_and_says_so(make_run, visited, follow, capsys):
    follow(FALLING)
    folder = make_run(hparams=SWAD)
    (record,) = folder.records()
    assert (record["average"]["converged"], record["average"]["steps"]) == (False, 0)
    saved = loaded(folder, STEPS - 1)
    assert all(torch.equal(saved[name], tensor) for name, tensor in visited[STEPS - 1].items())
    assert "warning: average=swad has not converged within 7 validation losses" in capsys.readouterr().err


def test_swad_follows_the_mean_cross_entropy_of_the_training_environments(make_run, monkeypatch):
    judged, losses = [], Feed.losses

    def note(self, step, names):
        judged.append((step, names, losses(self, step, names)))
        return judged[-1][2]

    monkeypatch.setattr(Feed, "losses", note)
    (record,) = make_run(hparams=SWAD).records()
    assert [step for step, _, _ in judged] == list(VALLEY)
    assert all(names == ["env1_out", "env2_out", "env3_out"] for _, names, _ in judged)
    expected = [[step, float(np.mean(list(values.values())))] for step, _, values in judged]
    assert record["average"]["validation_losses"] == expected


def test_a_loss_that_is_not_finite_marks_the_run(make_run, follow):
    follow({**VALLEY, 10: float("nan"), 11: float("nan")})
    folder = make_run(hparams=SWAD)
    (record,) = folder.records()
    assert record["diverged"] and record["first_nonfinite_step"] == 10
    assert record["average"]["validation_losses"][-1] == [11, None]


def content(folder):
    kept = [
        {name: value for name, value in record.items() if name not in ("args", "run", "step_time", "mem_gb", "ways")}
        for record in folder.records()
    ]
    return kept, {
        path.relative_to(folder.path): path.read_bytes() for path in sorted(folder.path.glob("*/*.safetensors"))
    }


@pytest.mark.parametrize("hparams", [MA, SWAD], ids=["ma", "swad"])
@pytest.mark.parametrize("at", [4, 9, STEPS])
def test_a_run_that_was_stopped_ends_in_the_same(make_run, follow, monkeypatch, hparams, at):
    follow(VALLEY)
    undisturbed = make_run("undisturbed", hparams)
    accuracies, step = Feed.accuracies, Training._step
    stopped = []

    def stop(self):
        if not stopped and self.steps_done == at:
            stopped.append(at)
            raise Interrupted("for a test")

    def at_step(self, stream):
        stop(self)
        step(self, stream)

    def in_evaluation(self, of, names, *logits):
        if at == STEPS and not stopped and of == STEPS - 1 and "env0_in" in names:
            stopped.append(at)
            raise Interrupted("for a test")
        return accuracies(self, of, names, *logits)

    monkeypatch.setattr(Training, "_step", at_step)
    monkeypatch.setattr(Feed, "accuracies", in_evaluation)
    make_run("run", hparams, ExitCode.INTERRUPTED)
    assert stopped == [at]
    assert content(make_run("run", hparams)) == content(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["ma", "swad"])
def test_a_run_that_was_killed_ends_in_the_same(tmp_path, average):
    hparams = json.dumps({"adapter_dropout": 0.1, "batch_size": 4, "average": average})
    words = ["--hparams", hparams, "--checkpoint_freq", "2"]
    assert faults.Run(tmp_path / "whole", *words).end() == 0
    assert faults.kill_at_random(tmp_path / "run", 1, *words, kills=2)
    assert faults.outcome(tmp_path / "run") == faults.outcome(tmp_path / "whole")
