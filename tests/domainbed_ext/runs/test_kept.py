"""Lean evaluation: the selected step is evaluated on all splits when the run ends, from its kept weights."""

import json

import pytest
import torch

from domainbed_ext import register_algorithm, train
from domainbed_ext.algorithms.full import FullFT
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.report.results import Results
from domainbed_ext.runs import checkpoint
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.kept import Kept
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import Interrupted
from tests.domainbed_ext import fault_injection as faults

SELECTED, LAST = 2, 4
VARYING = {"step_time", "args", "mem_gb", "ways"}  # "ways" are those of all splits so far


@pytest.fixture
def selecting(monkeypatch):
    """Step 2 of 5 is the best of all runs, which are evaluated after each step."""
    faults.select_step(SELECTED, monkeypatch.setattr)


@pytest.fixture
def make_run(make_args, tmp_path):
    def make(name, **overrides):
        steps = {"steps": LAST + 1, "checkpoint_freq": 1, "hparams": '{"lr": 0.01, "batch_size": 4}'}
        args = make_args(**{**steps, **overrides}, output_dir=str(tmp_path / name))
        assert train.run(args) == ExitCode.DONE
        return RunFolder(tmp_path / name)

    return make


def content(folder):
    """The records by step, without what differs from one run to the next."""
    records = {record["step"]: record for record in map(json.loads, folder.lines())}
    return {step: {k: v for k, v in record.items() if k not in VARYING} for step, record in records.items()}


class Shifting(FullFT):
    """Predicts with a number that is neither parameter nor buffer."""

    shift = 0.0

    def update(self, minibatches, unlabeled=None):
        self.shift += 3.0
        return super().update(minibatches, unlabeled)

    def predict(self, x):
        logits = super().predict(x)
        return logits + self.shift * torch.linspace(0, 1, logits.shape[1])

    def training_state(self):
        return {**super().training_state(), "shift": self.shift}

    def load_training_state(self, state):
        super().load_training_state(state)
        self.shift = state["shift"]


@pytest.fixture
def own_method(registries):
    register_algorithm("Shifting")(Shifting)
    assert "Shifting" in METHODS


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "BA", "hparams": '{"lr": 0.01, "batch_size": 4, "adapter_dropout": 0.1}'},
        {"algorithm": "LP", "validation_images": "augmented"},
        # Whose BatchNorm has buffers that change.
        {"algorithm": "FullFT", "backbone": "test_resnet", "weights": "none",
         "hparams": '{"lr": 0.01, "batch_size": 4, "image_size": 32}'},
        {"algorithm": "Shifting"},
    ],
    ids=lambda options: options["algorithm"],
)  # fmt: skip
def test_the_selected_and_the_last_record_are_those_of_an_evaluation_of_all(selecting, make_run, own_method, options):
    whole, lean = make_run("all", evaluate="all", **options), make_run("lean", **options)
    expected, records = content(whole), content(lean)
    assert list(records) == list(expected) == list(range(LAST + 1))
    others = {name for name in expected[0] if name.endswith("_acc")} - {f"env{env}_out_acc" for env in (1, 2, 3)}
    assert len(others) == 5
    for step, record in expected.items():
        assert records[step] == (
            record if step in (SELECTED, LAST) else {name: v for name, v in record.items() if name not in others}
        )
    tables = [Results(folder.records()).tidy() for folder in (whole, lean)]
    assert tables[0].equals(tables[1])
    for place in ("selected", "last"):
        files = [sorted((folder.path / place).iterdir()) for folder in (whole, lean)]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_other_splits_are_evaluated_for_the_selected_and_the_last_step_alone(selecting, make_run, monkeypatch, capsys):
    evaluated = faults.note_evaluations(monkeypatch.setattr)
    make_run("run", algorithm="LP")
    validation = ["env1_out", "env2_out", "env3_out"]
    assert [step for step, names in evaluated if names == validation] == list(range(LAST + 1))
    rest = ["env0_in", "env0_out", "env1_in", "env2_in", "env3_in"]
    assert [step for step, names in evaluated if names != validation] == [SELECTED, LAST]
    assert all(names in (validation, rest) for _, names in evaluated)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == [0, 1, 2, 3, SELECTED, LAST]
    assert all(("env0" in line or "blended (test)" in line) == (index > 3) for index, line in enumerate(lines))


def test_where_the_last_step_is_the_best_it_is_evaluated_once(make_run, monkeypatch):
    faults.select_step(LAST, monkeypatch.setattr)
    evaluated = faults.note_evaluations(monkeypatch.setattr)
    make_run("run", algorithm="LP")
    assert [step for step, names in evaluated if "env0_in" in names] == [LAST]


def interrupt_once(monkeypatch, step):
    """Lets the evaluation of a step on the other splits end in a stop request, once."""
    original, requested = faults.Feed.accuracies, []

    def accuracies(self, of, names, *logits):
        if of == step and "env0_in" in names and not requested:
            requested.append(True)
            raise Interrupted("for a test")
        return original(self, of, names, *logits)

    monkeypatch.setattr(faults.Feed, "accuracies", accuracies)


@pytest.mark.parametrize(("step", "algorithm"), [(SELECTED, "BA"), (LAST, "BA"), (SELECTED, "Shifting")])
def test_interrupted_in_the_last_evaluations_it_resumes_to_the_same(
    selecting, make_run, own_method, make_args, tmp_path, monkeypatch, step, algorithm
):
    undisturbed = make_run("undisturbed", algorithm=algorithm)
    interrupt_once(monkeypatch, step)
    args = {"steps": LAST + 1, "checkpoint_freq": 1, "hparams": '{"lr": 0.01, "batch_size": 4}'}
    args |= {"algorithm": algorithm, "output_dir": str(tmp_path / "run")}
    assert train.run(make_args(**args)) == ExitCode.INTERRUPTED
    folder = RunFolder(tmp_path / "run")
    state, _ = checkpoint.load(folder.path)
    assert state["steps_done"] == LAST + 1 and (state["kept"] is None) == (step == LAST)
    assert train.run(make_args(**args)) == ExitCode.DONE
    assert content(folder) == content(undisturbed)
    assert not list(folder.path.glob("checkpoint_*"))
    for file in (undisturbed.path / "last").iterdir():
        assert (folder.path / "last" / file.name).read_bytes() == file.read_bytes()


def test_the_checkpoint_of_an_interruption_holds_the_last_step(selecting, make_run, make_args, tmp_path, monkeypatch):
    words = {"algorithm": "BA", "steps": LAST + 1, "checkpoint_freq": 1, "hparams": '{"batch_size": 4}'}
    saved = []
    original = Kept.loaded_into

    def loaded_into(self, feed):
        saved.append({name: tensor.clone() for name, tensor in feed.algorithm.trained().items()})
        return original(self, feed)

    monkeypatch.setattr(Kept, "loaded_into", loaded_into)
    interrupt_once(monkeypatch, SELECTED)
    assert train.run(make_args(**words)) == ExitCode.INTERRUPTED
    state, _ = checkpoint.load(tmp_path / "run")
    tensors, kept = state["algorithm"]["tensors"], state["kept"]["state"]["tensors"]
    names = [name for name in saved[0] if torch.is_floating_point(saved[0][name])]
    assert names and all(torch.equal(saved[0][name], tensors[f"backbone.{name}"]) for name in names)
    assert not all(torch.equal(kept[f"backbone.{name}"], tensors[f"backbone.{name}"]) for name in names)


def test_killed_in_the_last_evaluations_it_ends_in_the_same(tmp_path):
    assert faults.Run(tmp_path / "whole", before=faults.select_step_4).end() == 0
    folder = tmp_path / "run"
    assert faults.Run(folder, before=faults.die_in_the_evaluation_of_step_4).end() == -9
    assert RunFolder(folder).state is not State.DONE and "env0_in_acc" not in RunFolder(folder).records()[1]
    assert faults.Run(folder, before=faults.select_step_4).end() == 0
    assert faults.outcome(folder) == faults.outcome(tmp_path / "whole")
    selected = {record["step"]: record for record in RunFolder(folder).records()}[4]
    assert "env0_in_acc" in selected


def test_a_checkpoint_of_an_earlier_version_resumes(selecting, make_run, make_args, tmp_path, monkeypatch):
    """Its best record has all accuracies already."""
    undisturbed = make_run("undisturbed", algorithm="LP")
    interrupt_once(monkeypatch, SELECTED)
    args = {"steps": LAST + 1, "checkpoint_freq": 1, "hparams": '{"lr": 0.01, "batch_size": 4}', "algorithm": "LP"}
    folder = RunFolder(tmp_path / "run")
    assert train.run(make_args(**args)) == ExitCode.INTERRUPTED
    state, _ = checkpoint.load(folder.path)
    del state["kept"]
    state["lines"][SELECTED] = undisturbed.lines()[SELECTED]
    checkpoint.save(folder.path, state["steps_done"], state)
    assert train.run(make_args(**args)) == ExitCode.DONE
    assert content(folder) == content(undisturbed)


def test_an_output_of_the_selected_step_that_is_not_finite_marks_its_record_and_the_later_ones(
    selecting, make_run, monkeypatch, capsys
):
    original = faults.Feed.accuracies

    def accuracies(self, step, names, *logits):
        values = original(self, step, names, *logits)
        return values | {"env0_in_acc": float("nan")} if step == SELECTED and "env0_in" in names else values

    monkeypatch.setattr(faults.Feed, "accuracies", accuracies)
    whole, lean = make_run("all", algorithm="LP", evaluate="all"), make_run("lean", algorithm="LP")
    expected, records = content(whole), content(lean)
    flags = [{step: each.get("first_nonfinite_step") for step, each in of.items()} for of in (expected, records)]
    assert flags[0] == flags[1] == {0: None, 1: None, 2: 2, 3: 2, 4: 2}
    assert records[SELECTED] == expected[SELECTED] and records[LAST] == expected[LAST]
    assert lean.diverged and "the run diverged at step 2: env0_in_acc is nan" in capsys.readouterr().err


def test_what_is_kept_leaves_out_optimizers(make_args):
    setup = run_setup.set_up(make_args(algorithm="BOnly"))
    algorithm = setup.make_algorithm()
    kept = Kept.after(0, Feed(setup, algorithm)).state
    assert kept["parts"] == {} and "optimizer" in algorithm.training_state()["parts"]
    trained = algorithm.trained()
    assert {name.removeprefix("backbone.") for name in kept["tensors"]} >= set(trained)
    places = {tensor.data_ptr() for tensor in algorithm.state_dict().values()}
    assert not places & {tensor.data_ptr() for tensor in kept["tensors"].values() if tensor.numel()}


def test_a_method_that_predicts_with_what_its_state_lacks_is_refused(
    selecting, own_method, make_args, tmp_path, monkeypatch
):
    words = {"algorithm": "Shifting", "steps": LAST + 1, "checkpoint_freq": 1, "hparams": '{"batch_size": 4}'}
    for name in ("training_state", "load_training_state"):
        monkeypatch.setattr(Shifting, name, getattr(FullFT, name))
    assert train.run(make_args(**words, evaluate="all", output_dir=str(tmp_path / "all"))) == ExitCode.DONE
    assert train.run(make_args(**words)) == ExitCode.BAD_INPUT
    sentence = "Shifting predicts with something that its training_state does not hold, so step 2 cannot be evaluated"
    assert sentence in RunFolder(tmp_path / "run").failure()


def test_a_method_that_predicts_at_random_is_not_refused(selecting, make_run, own_method, monkeypatch):
    monkeypatch.setattr(Shifting, "predict", lambda self, x: torch.rand(len(x), 6))
    assert "env0_in_acc" in content(make_run("run", algorithm="Shifting"))[SELECTED]
