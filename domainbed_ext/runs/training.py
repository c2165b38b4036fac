"""The training of a run, from its first step or its last checkpoint to its last step."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import OutOfMemoryError, Tensor, cuda, manual_seed

from domainbed_ext.algorithms.base import Recorded
from domainbed_ext.algorithms.schedules import Schedule
from domainbed_ext.data.loader import Minibatch
from domainbed_ext.divergence import Watch
from domainbed_ext.model_selection import best_step, better
from domainbed_ext.runs import checkpoint, formatting, ways
from domainbed_ext.runs.collect_predictions import collect_predictions
from domainbed_ext.runs.device_errors import out_of_memory
from domainbed_ext.runs.differences import Kind, differences
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.head_start import start_head
from domainbed_ext.runs.ignored import check_ignored
from domainbed_ext.runs.kept import Kept
from domainbed_ext.runs.predictions import remove_predictions, save_predictions
from domainbed_ext.runs.remaining_time import RemainingTime
from domainbed_ext.runs.saved import BEST, LAST
from domainbed_ext.runs.setup import Setup, collect_facts, set_up_process
from domainbed_ext.runs.step_values import UnreadValues
from domainbed_ext.runs.tracking import Tracking, tracked
from domainbed_ext.seeds import seed_hash
from domainbed_ext.system.attempts import Claim
from domainbed_ext.system.commands import format_command
from domainbed_ext.system.files import replace_atomically
from domainbed_ext.system.interrupts import Interrupted, Stop
from domainbed_ext.system.progress import Bar, bar, format_duration

_LONG = 60.0  # seconds of evaluation that are worth a line

Progress = Callable[[float], None]
"""Function that is told the share of the steps that are done."""


class Training:
    """The steps of a run that are still to be done, from the first or from the last checkpoint.

    Args:
        setup: Parts of the run.
        folder: Folder of the run.
        claim: Claim on the folder.
        stop: Function that is called wherever the run can stop; raises if it is to.
    """

    def __init__(self, setup: Setup, folder: RunFolder, claim: Claim, stop: Stop) -> None:
        self.setup, self.folder, self.claim, self.stop = setup, folder, claim, stop
        set_up_process(setup.args)
        self.algorithm = setup.make_algorithm()
        self.facts = collect_facts(setup, self.algorithm)
        state, different = self._read_checkpoint()
        ways.pin(None if different else state)
        self.feed = Feed(setup, self.algorithm, stop)
        if setup.args.profile:
            self.feed.measure()
        self.schedule = Schedule.of(setup.hparams, setup.steps)
        self.steps_done = 0
        self.best: float | None = None
        self.kept: Kept | None = None  # of the best step so far, unless it is evaluated on all splits
        self.best_logits: dict[str, Tensor] = {}  # of the best step so far, on each split that it is evaluated on
        self.stale = 0  # evaluations since the best step so far
        self.average = setup.make_average()
        self.watch = Watch(setup.args.stop_on_nan)
        self.values: dict[str, list[float]] = defaultdict(list)  # since the last record
        self.unread = UnreadValues()  # of the last of these steps
        self.saved_at = (time.monotonic(), 0)
        self._is_evaluation_announced = False
        self.time = RemainingTime(setup)
        self.tracking = Tracking(folder, self.facts)  # none is started yet
        self._resume(state, different)

    def finish(self, progress: Progress) -> None:
        """Does the remaining steps.

        Args:
            progress: Function that is told the share of the steps that are done.

        Raises:
            Interrupted: The run was asked to stop; it resumes from a checkpoint.
            Lost: Another process has the claim by now.
        """
        with tracked(self.folder, self.facts) as self.tracking:
            self._finish(progress)

    def _finish(self, progress: Progress) -> None:
        setup = self.setup
        self.watch.check()
        self.claim.begin_steps()
        stream = self.feed.training(range(self.steps_done, setup.steps))
        self.stop.at_once = False  # from here on there is something to save
        with bar(f"{setup.args.dataset} {setup.args.algorithm}", setup.steps, "steps") as steps:
            steps.start_from(self.steps_done)
            try:
                self._evaluate_if_due()
                while self.steps_done < setup.steps:
                    self.stop()
                    self._step(stream)
                    self._report(progress, steps)
                    self._save_if_due()
                    if self._evaluate_if_due():
                        self._report(progress, steps)
                        steps.start_from(self.steps_done)  # evaluating is not among the rate of steps
            except Interrupted:
                self._save()
                raise

    def _report(self, progress: Progress, steps: Bar) -> None:
        """Reports the progress to the claim, the bar and the caller."""
        self.time.note_evaluation(self.feed.seconds_an_image)
        self.claim.left = steps.seconds_left = self.time.estimate(self.steps_done)
        share = self.steps_done / self.setup.steps
        if share != self.claim.share:
            self.claim.share = share
            steps.reach(self.steps_done)
            progress(share)

    def _step(self, stream: Any) -> None:
        start = time.perf_counter()
        batches = next(stream)
        manual_seed(seed_hash(self.setup.args.seed, "update", self.steps_done))  # for step t needs no history (dropout)
        if not self.schedule.is_constant:
            self.algorithm.scale_rates(self.schedule.factor(self.steps_done))
        values = self._update(batches)
        check_ignored(self.algorithm, self.setup.hparams)
        losses, self.algorithm.domain_losses = self.algorithm.domain_losses, None  # the next update may leave it
        by_env = {} if losses is None else dict(zip(self._loss_names, losses, strict=False))
        self.average.add(self.steps_done, self.algorithm.moving)
        self.unread.add(self.steps_done, values, by_env, time.perf_counter() - start)
        self.steps_done += 1
        if self.unread.are_due:
            self._read_values()

    def _update(self, batches: list[Minibatch]) -> Recorded:
        try:
            return self.algorithm.update(batches)
        except OutOfMemoryError:
            pass  # and look for what fits only then: the error's traceback keeps the tensors of the step
        raise out_of_memory(self.algorithm, batches, self.setup.hparams)

    @property
    def _loss_names(self) -> list[str]:
        return [f"env{env}_loss" for env in self.setup.train_envs]

    def _read_values(self) -> None:
        """Reads the values of the last steps, and looks at each for a number that is not finite.

        Raises:
            Diverged: One is not, and the run is to stop then.
        """
        for each in self.unread.read():
            self._look(each.step, each.update)
            self.watch.check()
            for name, value in {**each.update, **each.losses, "step_time": each.seconds}.items():
                self.values[name].append(value)
            self.time.note_step(each.seconds)

    def _evaluate_if_due(self) -> bool:
        """Evaluates, records and saves after a step that is due, also where an earlier attempt was stopped at it.

        Returns:
            Whether it was due.
        """
        setup, step = self.setup, self.steps_done - 1
        if step < 0 or not setup.is_evaluated(step):
            return False
        self._read_values()
        if not self.values:  # the record was written before the checkpoint
            return False
        self._announce_evaluation()
        if self.average.judges and not self._judge(step):
            self.values.clear()
            return True
        with self.average.applied(self.algorithm.moving):
            self._evaluate(self.steps_done - 1)
        return True

    def _judge(self, step: int) -> bool:
        """Tells the average the validation loss of a step's weights.

        Returns:
            Whether the run ends here: after its last step, or as soon as no later one can change the average.
        """
        if not self.average.is_judged:  # an attempt that was stopped in the evaluation of the average has done it
            losses = self.feed.losses(step, self.setup.validation_splits)
            loss = float(np.mean(list(losses.values())))
            self._look(step, losses)
            self.watch.check()
            self.average.judge(loss)
            print(formatting.format_loss(step, loss, self.setup.steps, self.claim.seconds))
        if self.average.is_complete and self.steps_done < self.setup.steps:
            print(f"the average is complete: the remaining {self.setup.steps - self.steps_done} steps are left out")
            self.steps_done = self.setup.steps
        return self.steps_done == self.setup.steps

    def _evaluate(self, step: int) -> None:
        """Evaluates, records and saves the model after a step."""
        setup, logits = self.setup, dict[str, Tensor]()
        accuracies = self._accuracies(step, setup.validation_splits, logits)
        val_acc = float(np.mean(list(accuracies.values())))
        new_best = better(val_acc, self.best)
        stale = 0 if new_best else self.stale + 1
        stops = step < setup.steps - 1 and stale == setup.args.early_stopping
        last = stops or step == setup.steps - 1
        # Every figure is read from the best step or from the last, which lean evaluation relies on.
        is_full = last or setup.args.evaluate == "all"
        if last and not new_best:
            self._complete_best()
        if is_full:
            accuracies |= self._accuracies(step, setup.other_splits, logits)
        self.claim.check()
        self._look(step, accuracies)
        with self.feed.stage("write"):
            self._record(step, accuracies, {"stopped_early": True} if stops else {})
            self._save_model(step, {"selected": new_best, "last": last and not new_best})
        self.stale = stale
        if new_best:
            self.best, self.kept = val_acc, None if is_full else Kept.after(step, self.feed)
            self.best_logits = logits
        if last and not setup.args.skip_predictions:
            with self.feed.stage("write"):
                self._save_predictions(step, logits)
        self.values.clear()
        self.watch.check()
        if stops:
            why = f"no better validation accuracy in {stale} evaluation{'s' * (stale > 1)}"
            print(f"{why}: the remaining {setup.steps - self.steps_done} steps are left out (--early_stopping)")
            self.steps_done = setup.steps
        if last:
            self._report_average()
        if last and self.feed.profile:
            print(self.feed.profile.table())

    def _accuracies(self, step: int, names: Sequence[str], logits: dict[str, Tensor]) -> dict[str, float]:
        """The accuracies on some splits; the logits are added to `logits` if the run keeps predictions."""
        return self.feed.accuracies(step, names, None if self.setup.args.skip_predictions else logits)

    def _save_predictions(self, step: int, logits: dict[str, Tensor]) -> None:
        """Writes the predictions of the best step, and of the last if that is another."""
        best = best_step(self.folder.records())["step"]
        if best != step:
            save_predictions(self.folder, collect_predictions(self.setup, step, LAST, logits))
        else:
            remove_predictions(self.folder, LAST)  # of an earlier attempt, for which another step was the best
        if self.best_logits.keys() == logits.keys():
            save_predictions(self.folder, collect_predictions(self.setup, best, BEST, self.best_logits))
        else:  # the checkpoint is of an earlier version, or of an attempt with --skip_predictions
            print(
                f"warning: no predictions of step {best}, which was evaluated without keeping them: add them with "
                f"{format_command('evaluate')} --run {self.folder.path} --predictions",
                file=sys.stderr,
            )

    def _report_average(self) -> None:
        if self.average.summary:
            print(self.average.summary)
        if self.average.warning:
            print(f"warning: {self.average.warning}", file=sys.stderr)

    def _complete_best(self) -> None:
        """Evaluates the best step on the other splits too, if it was not, and adds the accuracies to its record."""
        if self.kept is None:
            return
        step = self.kept.step
        with self.kept.loaded_into(self.feed):
            accuracies = self._accuracies(step, self.setup.other_splits, self.best_logits)
        self.claim.check()
        diverged = self.watch.fields if self._look(step, accuracies) else {}
        with self.feed.stage("write"):
            record = self.folder.amend(step, accuracies, diverged)
        print(formatting.format_record(record, self.setup.steps, self.claim.seconds))
        self.kept = None
        self.watch.check()

    def _announce_evaluation(self) -> None:
        """Prints once how long evaluation takes, as soon as that is known and if it is long."""
        seconds = self.time.estimate_evaluation(self.steps_done - 1)
        if seconds is None or self._is_evaluation_announced:
            return
        self._is_evaluation_announced = True
        if seconds >= _LONG:
            count = self.time.count_images(self.steps_done - 1)
            most = "at most " if self.setup.args.evaluate == "lean" else ""
            print(f"evaluating the remaining images, {most}{count:,}, will take about {format_duration(seconds)}")

    def _look(self, step: int, values: Mapping[str, float]) -> bool:
        """Returns whether the run diverged at this step."""
        if diverged := self.watch.look(step, values):
            self.folder.diverge(step)
        return diverged

    def _record(self, step: int, accuracies: dict[str, float], ending: dict[str, Any]) -> None:
        record = {
            **self.facts,
            **{name: float(np.mean(history)) for name, history in self.values.items()},
            **accuracies,
            **self.watch.fields,
            **self.average.fields,
            **ways.used(),
            **ending,
            "step": step,
            "epoch": step / self.setup.steps_per_epoch,
            "learning_rate": self.algorithm.learning_rate,
            "mem_gb": cuda.max_memory_allocated() / 2**30 if self.algorithm.device.type == "cuda" else 0.0,
        }
        self.folder.append(record | ({"profile": self.feed.profile.summary()} if self.feed.profile else {}))
        self.tracking.log(record)
        print(formatting.format_record(record, self.setup.steps, self.claim.seconds))

    def _save_model(self, step: int, places: dict[str, bool]) -> None:
        """Writes what was trained to the places that are marked."""
        if self.setup.args.skip_model_save:
            return
        places[f"step_{step}"] = self.setup.args.save_model_every_checkpoint
        for place in (place for place, wanted in places.items() if wanted):
            replace_atomically(self.folder.path / place, self.algorithm.save)

    def _read_checkpoint(self) -> tuple[dict[str, Any] | None, dict[Kind, str]]:
        """The last checkpoint that can be read, if there is one, and how it differs from this computation."""
        state, warnings = checkpoint.load(self.folder.path)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return state, {} if state is None else differences(state["facts"], self.facts)

    def _resume(self, state: dict[str, Any] | None, different: Mapping[Kind, str]) -> None:
        """Resumes from a checkpoint, if it is of this computation; else starts."""
        if different:
            _ = self.feed.images.evaluation  # an error if images are broken now: the checkpoint is kept until then
            listed = ", ".join(f"{kind.value} ({words})" for kind, words in different.items())
            print(f"warning: the checkpoint is of other {listed}: the run starts again", file=sys.stderr)
            state = None
        if state is not None and "data_digest" not in state["facts"]:
            print("warning: the checkpoint does not record its data: taken as the data here", file=sys.stderr)
        if state is None:
            self.folder.start()
            print(formatting.format_header(self.facts, self.setup))
            self._start_head()
            manual_seed(seed_hash(self.setup.args.seed, "begin"))
            self.algorithm.objective.begin(self.setup.steps)
            self.algorithm.begin(self.setup.steps, self._first_minibatches)
            return
        self.folder.start(state["lines"])
        self.algorithm.load_training_state(state["algorithm"])
        checkpoint.set_random_states(state["random"])
        self.steps_done, self.best, self.stale = state["steps_done"], state["best"], state.get("stale", 0)
        if average := state.get("average"):  # checkpoints of earlier versions have none
            self.average.load_state_dict(average)
        # Checkpoints of earlier versions have none: they evaluated each new best on all splits at once.
        self.kept = Kept(**state["kept"]) if state.get("kept") else None
        self.best_logits = state.get("best_logits", {})  # nor have they these
        if (step := state.get("diverged")) is not None:
            self.watch.step = step
            self.folder.diverge(step)
        self.values.update(state["values"])
        self.saved_at = (time.monotonic(), self.steps_done)
        print(f"resumes after {self.steps_done} of {self.setup.steps} steps (attempt {self.claim.number})")

    def _start_head(self) -> None:
        """Lets the head start at the linear probe, if it is to; the first record has the probe's accuracy."""
        if not self.algorithm.starts_at_probe:
            return
        probe = start_head(self.feed, self.folder)
        print(f"the head starts at the linear probe: validation accuracy {probe.accuracy:.3f}, L2 {probe.l2:g}")
        self.values["probe_accuracy"].append(probe.accuracy)

    def _first_minibatches(self, count: int) -> Iterator[list[Minibatch]]:
        """The minibatches of the first steps."""
        return self.feed.training(range(min(count, self.setup.steps)))

    def _save_if_due(self) -> None:
        args, (then, step) = self.setup.args, self.saved_at
        minutes = (time.monotonic() - then) / 60
        if (args.save_minutes and minutes >= args.save_minutes) or (
            args.save_steps and self.steps_done - step >= args.save_steps
        ):
            self._save()

    def _save(self) -> None:
        """Writes a checkpoint; where there is no room for one, the run continues without."""
        self._read_values()
        self.claim.check()
        state = {
            "facts": self.facts,
            **ways.used(),
            "steps_done": self.steps_done,
            "best": self.best,
            "kept": {"step": self.kept.step, "state": self.kept.state} if self.kept else None,
            "best_logits": self.best_logits,
            "stale": self.stale,
            "average": self.average.state_dict(),
            "diverged": self.watch.step,
            "values": dict(self.values),
            "lines": self.folder.lines(),
            "random": checkpoint.random_states(),
            "algorithm": self.algorithm.training_state(),
        }
        try:
            checkpoint.save(self.folder.path, self.steps_done, state)
        except OSError as error:
            print(f"warning: no checkpoint after step {self.steps_done} ({error}): the run continues", file=sys.stderr)
        self.saved_at = (time.monotonic(), self.steps_done)
