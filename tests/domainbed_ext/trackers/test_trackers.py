"""What trackers receive of a run, also where it was stopped, killed or started again, and where they fail."""

import csv
import importlib.util
import json
import random
import sys
import types

import pytest
import torch

from domainbed_ext import train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import arguments
from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.tracking import Tracking
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.trackers.base import Tracker
from domainbed_ext.trackers.registry import check_trackers, register_tracker
from domainbed_ext.trackers.values import tracked_values
from tests.domainbed_ext.fault_injection import Run

SHORT = {"steps": 5, "checkpoint_freq": 2}


@pytest.fixture
def spy(registries):
    """A tracker that notes in its class what it is told."""

    @register_tracker("spy")
    class Spy(Tracker):
        told: list = []  # noqa: RUF012
        fails_in = None

        def __init__(self, run, last_step):
            super().__init__(run, last_step)
            self._tell("open", run, last_step)

        def log(self, step, values):
            self._tell("log", step, values)

        def select(self, step, values):
            self._tell("select", step, values)

        def close(self, is_done):
            self._tell("close", is_done)

        def _tell(self, what, *facts):
            if what == self.fails_in:
                raise ConnectionError("no\nnetwork")
            self.told.append((what, *facts))

    return Spy


def test_a_tracker_receives_each_record_and_the_selected_step(spy, make_args, few_evaluated):
    args = make_args(**SHORT, algorithm="BOnly@clip_grad=1.0", test_envs=[3], track=["spy"], data_dir=None)
    assert train.run(args) == 0
    opened, *logged, selected, closed = spy.told
    run = opened[1]
    assert opened[2] is None and closed == ("close", True)
    assert run.name == "DigitsShift_BOnly@clip_grad=1.0_test-sketched_trial0_hparams0"
    assert run.group == RunFolder(args.output_dir).path.parent.name
    assert run.config["hparams"]["clip_grad"] == 1.0 and not {"output_dir", "data_dir", "track"} & run.config.keys()
    records = RunFolder(args.output_dir).records()
    assert [step for _, step, _ in logged] == [record["step"] for record in records] == [0, 2, 4]
    for record, (_, _, values) in zip(records, logged, strict=True):
        names = "loss", "learning_rate", "step_time", "grad_norm"
        assert {name: values[name] for name in names} == {name: record[name] for name in names}
        assert values["accuracy/plain_out"] == record["env1_out_acc"]
        assert "total_parameters" not in values and "first_nonfinite_step" not in values
    last = logged[-1][2]
    assert last["test_accuracy/sketched_in"] == last["test_accuracy/out_of_domain"] == records[-1]["env3_in_acc"]
    best = max(records, key=lambda record: (sum(record[f"env{i}_out_acc"] for i in range(3)), -record["step"]))
    assert selected[1] == best["step"] and selected[2]["test_accuracy/out_of_domain"] == best["env3_in_acc"]


def test_what_is_not_finite_is_left_out():
    record = {"step": 3, "loss": float("nan"), "grad_norm": None, "diverged": True, "first_nonfinite_step": 2}
    facts = {"environments": ["a", "b"], "args": {"test_envs": [1]}, "split_sizes": {"env0_out": 9, "env1_in": 9}}
    values = tracked_values({**record, **facts, "env0_out_acc": 0.5, "env0_loss": 1.5}, facts)
    assert values == {"first_nonfinite_step": 2, "accuracy/a_out": 0.5, "loss/a": 1.5, "accuracy/in_domain": 0.5}


@pytest.mark.parametrize("where", ["open", "log", "select", "close"])
def test_a_tracker_that_fails_gets_a_warning_and_the_run_continues(spy, make_args, few_evaluated, capsys, where):
    spy.fails_in = where
    assert train.run(make_args(**SHORT, track=["spy", "csv"])) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--track" in line]
    assert warnings == ["warning: --track spy failed (ConnectionError: no network): the run continues without it"]
    assert (RunFolder(make_args().output_dir).path / "tracked" / "values.csv").exists()


def interrupt_after(spy, step, monkeypatch):
    """Stops a run as soon as the tracker has received a step."""
    from domainbed_ext.system import interrupts

    stops = []
    make = interrupts.Stop.__init__

    def remember(stop):
        make(stop)
        stops.append(stop)

    log = spy.log

    def log_and_stop(self, now, values):
        log(self, now, values)
        if now == step:
            stops[-1].request = interrupts.Interrupted("by the test")

    monkeypatch.setattr(interrupts.Stop, "__init__", remember)
    monkeypatch.setattr(spy, "log", log_and_stop)


def test_a_resumed_run_sends_no_record_twice(spy, make_args, few_evaluated, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(spy, 2, patch)
        assert train.run(make_args(**SHORT, track=["spy"])) == ExitCode.INTERRUPTED
    assert spy.told[-1] == ("close", False)
    assert train.run(make_args(**SHORT, track=["spy", "csv"])) == 0
    opened = [told for told in spy.told if told[0] == "open"]
    assert opened[0][1].id == opened[1][1].id and [told[2] for told in opened] == [None, 2]
    assert [told[1] for told in spy.told if told[0] == "log"] == [0, 2, 4]
    with (RunFolder(make_args().output_dir).path / "tracked" / "values.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "2", "4"]  # added later, it received all


def test_a_run_that_starts_again_is_another_one(spy, make_args, few_evaluated, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(spy, 2, patch)
        assert train.run(make_args(**SHORT, track=["spy"])) == ExitCode.INTERRUPTED
    assert train.run(make_args(**SHORT, seed=1, track=["spy"])) == 0
    assert "the run starts again" in capsys.readouterr().err
    first, second = (told for told in spy.told if told[0] == "open")
    assert first[1].id != second[1].id and second[2] is None
    assert [told[1] for told in spy.told if told[0] == "log"] == [0, 2, 0, 2, 4]


@pytest.mark.slow
def test_a_killed_run_has_the_rows_of_one_that_was_not(tmp_path):
    """It is killed after records that are newer than its checkpoint, and sends these again."""
    words = ["--save_steps", "5", "--track", "csv"]
    run = Run(tmp_path / "killed", *words)
    run.wait_for_step(9)
    run.kill()
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        assert Run(folder, *words).end() == 0
    rows = []
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        with (folder / "tracked" / "values.csv").open() as file:
            rows.append([{name: row[name] for name in row if name != "step_time"} for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == ["0", "4", "8", "11"]
    assert [row["selected"] for row in rows[0]].count("1") == 1


def test_tensorboard_shows_each_step_once(make_args, few_evaluated, registries, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from domainbed_ext.trackers.tensorboard import TensorBoard

    with monkeypatch.context() as patch:
        interrupt_after(TensorBoard, 2, patch)
        assert train.run(make_args(**SHORT, track=["tensorboard"])) == ExitCode.INTERRUPTED
    # As if it had been killed between an event and the note of it:
    folder = RunFolder(make_args().output_dir).path / "tracked"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "steps": {"tensorboard": 0}}))
    assert train.run(make_args(**SHORT, track=["tensorboard"])) == 0
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"loss", "learning_rate", "step_time", "accuracy/in_domain", "test_accuracy/out_of_domain"} <= set(tags)
    records = RunFolder(make_args().output_dir).records()
    assert [event.step for event in events.Scalars("loss")] == [0, 2, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([record["loss"] for record in records])
    assert len(events.Scalars("selected/test_accuracy/out_of_domain")) == 1


def test_a_tracker_moves_no_random_generator(spy, make_args, few_evaluated, monkeypatch):
    assert train.run(make_args(steps=1)) == 0
    (record,) = RunFolder(make_args().output_dir).records()
    record = {**record, "args": {**record["args"], "track": ["spy"]}}
    monkeypatch.setattr(spy, "log", lambda self, step, values: (random.seed(1), torch.manual_seed(1)))
    before = random.getstate(), torch.get_rng_state()
    tracking = Tracking(RunFolder(make_args().output_dir), record)
    tracking.open()
    assert spy.told and random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


class FakeRun:
    """A run of W&B or Trackio as far as trackers use it."""

    def __init__(self, step=0):
        self.step, self.logged, self.summary, self.exit_code = step, [], {}, None

    def log(self, values, step, commit=None):
        self.logged.append((step, values))
        self.step = step + 1

    def finish(self, exit_code=None):
        self.exit_code = exit_code if exit_code is not None else 0


@pytest.fixture
def fake(monkeypatch):
    """Returns a stand-in for a package, which notes how it was asked for a run."""

    def make(name, **extra):
        package = types.ModuleType(name)
        package.asked, package.run = [], FakeRun()

        def init(**words):
            package.asked.append(words)
            return package.run

        package.init = init
        vars(package).update(extra)
        package.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        monkeypatch.setitem(sys.modules, name, package)
        return package

    return make


def test_wandb_continues_its_run_and_skips_what_it_has(fake, make_args, few_evaluated, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    wandb = fake("wandb", Settings=lambda **words: words)
    wandb.run.step = 1  # the server has the first record
    assert train.run(make_args(**SHORT, track=["wandb"])) == 0
    (asked,) = wandb.asked
    assert (asked["project"], asked["resume"], asked["settings"]) == ("mine", "allow", {"console": "off"})
    state = json.loads((RunFolder(make_args().output_dir).path / "tracked" / "state.json").read_text())
    assert asked["id"] == state["id"] and asked["config"]["algorithm"] == "BOnly"
    assert [step for step, _ in wandb.run.logged] == [2, 4] and wandb.run.exit_code == 0
    assert "selected/test_accuracy/out_of_domain" in wandb.run.summary


def test_trackio_continues_its_run(fake, make_args, few_evaluated):
    trackio = fake("trackio")
    trackio.finish = trackio.run.finish
    assert train.run(make_args(**SHORT, track=["trackio"])) == 0
    (asked,) = trackio.asked
    assert (
        asked["project"] == "domainbed_ext"
        and asked["resume"] == "allow"
        and asked["name"].endswith(
            json.loads((RunFolder(make_args().output_dir).path / "tracked" / "state.json").read_text())["id"]
        )
    )
    *logged, (step, selected) = trackio.run.logged
    assert [each for each, _ in logged] == [0, 2, 4] and "selected/accuracy/in_domain" in selected and step in (0, 2, 4)
    assert trackio.run.exit_code == 0


def test_nothing_is_tracked_unless_asked(make_args, few_evaluated, fake):
    wandb = fake("wandb")
    assert train.run(make_args(steps=1)) == 0
    assert not wandb.asked and not (RunFolder(make_args().output_dir).path / "tracked").exists()


def test_an_unknown_tracker_or_a_missing_package_is_an_error_before_the_run(monkeypatch):
    with pytest.raises(BenchmarkError, match="unknown tracker 'tensorbord': did you mean 'tensorboard'"):
        train.check_arguments(RunArguments(track=["tensorbord"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BenchmarkError, match=r"--track wandb needs the package wandb: pip install 'vitlorafa\[wandb\]'"
    ):
        check_trackers(["csv", "wandb"])


OWN = """\
from domainbed_ext import Tracker, register_tracker


@register_tracker("lines")
class Lines(Tracker):
    def log(self, step, values):
        with (self.run.folder / "lines.txt").open("a") as file:
            file.write(f"{step} {values['loss'] > 0}\\n")
"""


def test_a_tracker_of_your_own_is_imported(tmp_path, monkeypatch, registries, few_evaluated):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    words = "--import mine.py --track lines --steps 3 --checkpoint_freq 1 --train_eval_share 0.05 --output_dir run"
    args = arguments.parse(words.split())
    train.check_arguments(args)
    assert train.run(args) == 0
    assert (tmp_path / "run" / "tracked" / "lines.txt").read_text() == "0 True\n1 True\n2 True\n"
