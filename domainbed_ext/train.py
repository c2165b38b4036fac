"""One run: trains an algorithm on all environments but the test ones, and records its accuracy on every split.

python -m domainbed_ext.train --algorithm BOnly --test_envs 0 --output_dir runs/one

A run that was stopped or killed resumes from its last checkpoint, to the same records and the same adapter: run the
same command again.
"""

import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import cuda, manual_seed

from domainbed_ext.data import duplicates
from domainbed_ext.divergence import Diverged, Watch
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import better
from domainbed_ext.runs import checkpoint
from domainbed_ext.runs import messages as run_report
from domainbed_ext.runs.arguments import RunArguments, parse
from domainbed_ext.runs.clock import RunTime
from domainbed_ext.runs.differences import Kind, differences
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.setup import Setup, compute_exactly, facts, set_up
from domainbed_ext.seeds import seed_hash
from domainbed_ext.system.attempts import Claim, Lost, Taken
from domainbed_ext.system.command_line import RESUME, as_command
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.files import replace_atomically
from domainbed_ext.system.interrupts import Interrupted, OutOfTime, Stop, stoppable
from domainbed_ext.system.progress import Bar, bar, display

Progress = Callable[[float], None]
"""Told the share of the steps that are done."""


class Training:
    """A run between its first step and its last, wherever it goes on from.

    Args:
        setup: the run's parts.
        folder: claimed.
        claim: on it.
        stop: called wherever the run can stop; raises if it is to.
    """

    def __init__(self, setup: Setup, folder: RunFolder, claim: Claim, stop: Stop) -> None:
        self.setup, self.folder, self.claim, self.stop = setup, folder, claim, stop
        compute_exactly(setup.args)
        self.algorithm = setup.make_algorithm()
        self.facts = facts(setup, self.algorithm)
        self.feed = Feed(setup, self.algorithm, stop)
        if setup.args.profile:
            self.feed.measure()
        self.steps_done = 0
        self.best: float | None = None
        self.watch = Watch(setup.args.stop_on_nan)
        self.values: dict[str, list[float]] = defaultdict(list)  # since the last record
        self.saved_at = (time.monotonic(), 0)
        self.time = RunTime(setup)
        self._go_on()

    def finish(self, progress: Progress) -> None:
        """Does what is left of it.

        Args:
            progress: told the share of the steps that are done.

        Raises:
            Interrupted: it was asked to stop; it goes on from a checkpoint.
            Lost: another process took it over.
        """
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
                    self._tell(progress, steps)
                    self._save_if_due()
                    if self._evaluate_if_due():
                        self._tell(progress, steps)
                        steps.start_from(self.steps_done)  # evaluating is not among the rate of steps
            except Interrupted:
                self._save()
                raise

    def _tell(self, progress: Progress, steps: Bar) -> None:
        """Tells everybody how far the run is."""
        self.time.evaluation(self.feed.seconds_an_image)
        self.claim.left = steps.seconds_left = self.time.left(self.steps_done)
        share = self.steps_done / self.setup.steps
        if share != self.claim.share:
            self.claim.share = share
            steps.reach(self.steps_done)
            progress(share)

    def _step(self, stream: Any) -> None:
        start = time.perf_counter()
        batches = next(stream)
        manual_seed(seed_hash(self.setup.args.seed, "update", self.steps_done))  # for step t needs no history (dropout)
        values = self.algorithm.update(batches)
        self._look(self.steps_done, values)
        self.watch.check()
        for name, value in values.items():
            self.values[name].append(value)
        self.values["step_time"].append(seconds := time.perf_counter() - start)
        self.time.step(seconds)
        self.steps_done += 1

    def _evaluate_if_due(self) -> bool:
        """Evaluates, records and saves after the steps that want it; also where an attempt before was stopped at it.

        Returns:
            Whether this step wanted it.
        """
        setup, step = self.setup, self.steps_done - 1
        last = step == setup.steps - 1
        if step < 0 or not (last or (setup.checkpoint_freq and step % setup.checkpoint_freq == 0)):
            return False
        if not self.values:  # the record was made before the checkpoint
            return False
        accuracies = self.feed.accuracies(step, setup.validation_splits)
        val_acc = float(np.mean(list(accuracies.values())))
        # Every figure is read from the best step or from the last, which lean evaluation relies on.
        new_best = better(val_acc, self.best)
        if new_best or last or setup.args.evaluate == "all":
            accuracies |= self.feed.accuracies(step, setup.other_splits)
        self.claim.check()
        self._look(step, accuracies)
        with self.feed.stage("write"):
            self._record(step, accuracies)
            self._save_model(step, {"selected": new_best, "last": last and not new_best})
        if new_best:
            self.best = val_acc
        self.values.clear()
        self.watch.check()
        if last and self.feed.profile:
            print(self.feed.profile.table())
        return True

    def _look(self, step: int, values: Mapping[str, float]) -> None:
        if self.watch.look(step, values):
            self.folder.diverge(step)

    def _record(self, step: int, accuracies: dict[str, float]) -> None:
        record = {
            **self.facts,
            **{name: float(np.mean(history)) for name, history in self.values.items()},
            **accuracies,
            **self.watch.fields,
            "step": step,
            "epoch": step / self.setup.steps_per_epoch,
            "mem_gb": cuda.max_memory_allocated() / 2**30 if cuda.is_available() else 0.0,
        }
        self.folder.append(record | ({"profile": self.feed.profile.summary()} if self.feed.profile else {}))
        print(run_report.line(record, self.setup.steps, self.claim.seconds))

    def _save_model(self, step: int, places: dict[str, bool]) -> None:
        """Writes what was trained to the places that want it."""
        if self.setup.args.skip_model_save:
            return
        places[f"step_{step}"] = self.setup.args.save_model_every_checkpoint
        for place in (place for place, wanted in places.items() if wanted):
            replace_atomically(self.folder.path / place, self.algorithm.save)

    def _go_on(self) -> None:
        """From the last checkpoint that can be read, if it is of this computation; else from the start."""
        state, complaints = checkpoint.load(self.folder.path)
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        if state is not None and (found := differences(state["facts"], self.facts)):
            _ = self.feed.images.evaluation  # an error if images are broken now: what was computed is kept until then
            told = ", ".join(f"{kind.value} ({words})" for kind, words in found.items())
            print(f"the checkpoint is of other {told}: starting again", file=sys.stderr)
            state = None
        if state is not None and "data_digest" not in state["facts"]:
            print("the checkpoint does not record of which data it is: taken as of the data here", file=sys.stderr)
        if state is None:
            self.folder.start()
            print(run_report.header(self.facts, self.setup))
            return
        self.folder.start(state["lines"])
        self.algorithm.load_training_state(state["algorithm"])
        checkpoint.set_random_states(state["random"])
        self.steps_done, self.best = state["steps_done"], state["best"]
        if (step := state.get("diverged")) is not None:
            self.watch.step = step
            self.folder.diverge(step)
        self.values.update(state["values"])
        self.saved_at = (time.monotonic(), self.steps_done)
        print(f"resumes after {self.steps_done} of {self.setup.steps} steps (attempt {self.claim.number})")

    def _save_if_due(self) -> None:
        args, (then, step) = self.setup.args, self.saved_at
        minutes = (time.monotonic() - then) / 60
        if (args.save_minutes and minutes >= args.save_minutes) or (
            args.save_steps and self.steps_done - step >= args.save_steps
        ):
            self._save()

    def _save(self) -> None:
        """Writes a checkpoint; where there is no room for one, the run goes on without."""
        self.claim.check()
        state = {
            "facts": self.facts,
            "steps_done": self.steps_done,
            "best": self.best,
            "diverged": self.watch.step,
            "values": dict(self.values),
            "lines": self.folder.lines(),
            "random": checkpoint.random_states(),
            "algorithm": self.algorithm.training_state(),
        }
        try:
            checkpoint.save(self.folder.path, self.steps_done, state)
        except OSError as error:
            print(f"no checkpoint after step {self.steps_done} ({error})", file=sys.stderr)
        self.saved_at = (time.monotonic(), self.steps_done)


def run(args: RunArguments, progress: Progress = lambda share: None) -> ExitCode:
    """A run from its arguments to its `done` or `failed`.

    Args:
        args: Arguments of the run.
        progress: told the share of the steps that are done.

    Returns:
        What became of it.

    Raises:
        BenchmarkError: the folder cannot be written, or holds another run that is done.
    """
    folder = RunFolder(args.output_dir)
    if folder.state is State.DONE:
        return _done_already(args, folder)
    try:
        claim = folder.claim()
    except Taken as taken:
        print(f"{taken}: leaving it alone", file=sys.stderr)
        return ExitCode.TAKEN
    with claim:
        if folder.state is State.DONE:  # just now, by another process
            claim.ended = "done"
            return ExitCode.DONE
        return _attempt(args, folder, claim, progress)


def _done_already(args: RunArguments, folder: RunFolder) -> ExitCode:
    """Accepts a finished run of the same computation; versions, precision and source files may have changed since."""
    record = folder.records()[-1]
    found = differences(record, facts(set_up(args)))
    if "data_digest" not in record:
        print(f"{folder.path} does not record of which data it is: taken as of the data here", file=sys.stderr)
    for kind, words in found.items():
        if kind in (Kind.ARGUMENTS, Kind.DATA, Kind.WEIGHTS):
            raise BenchmarkError(
                f"{folder.path} holds a finished run of other {kind.value} ({words}): give another --output_dir, or "
                f"the {kind.value} of then"
            )
        print(f"{folder.path} is of other {kind.value} ({words}): accepted as it is", file=sys.stderr)
    print(f"{folder.path} is done already")
    return ExitCode.DONE


def _attempt(args: RunArguments, folder: RunFolder, claim: Claim, progress: Progress) -> ExitCode:
    def fail(error: BaseException, sentence: str, code: ExitCode) -> ExitCode:
        claim.ended = "failed"
        folder.fail(sentence, code)
        print(f"error: {error}", file=sys.stderr)
        return code

    def hang(error: OutOfTime) -> None:
        fail(error, f"{error} and did not stop", ExitCode.FAILED)
        claim.beat()

    # The display is around the log, which gets what is printed and nothing of the bars.
    with display(), folder.log(), stoppable(args.time_limit, hang) as stop:
        stop.at_once = True
        try:
            with bar("setting up"):
                setup = set_up(args)
                duplicates.check(args.dataset, setup.dataset, args.duplicates, args.cache_dir)
                training = Training(setup, folder, claim, stop)
            training.finish(progress)
            claim.check()
            folder.finish()
            claim.ended = "done"
            print(run_report.closing(folder.records(), folder.path))
            return ExitCode.DONE
        except OutOfTime as error:
            return fail(error, f"{error}: give it a longer --time_limit, and it resumes", ExitCode.FAILED)
        except (Interrupted, KeyboardInterrupt) as interrupted:
            reason = f" ({interrupted})" if str(interrupted) else ""
            print(f"interrupted{reason}: {RESUME}", file=sys.stderr)
            return ExitCode.INTERRUPTED
        except Lost as lost:
            print(f"{lost}: leaving it alone", file=sys.stderr)
            return ExitCode.TAKEN
        except Diverged as error:
            return fail(error, str(error), ExitCode.FAILED)
        except BenchmarkError as error:
            return fail(error, str(error), ExitCode.BAD_INPUT)
        except OSError as error:  # a full disk, a folder that became read-only
            traceback.print_exc()
            where = error.filename or folder.path
            return fail(error, f"{error.strerror or error}: {where}; fix that, and it resumes", ExitCode.FAILED)
        except Exception as error:
            traceback.print_exc()
            return fail(error, f"{type(error).__name__}: {error}", ExitCode.FAILED)


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.train`."""
    return run(parse(argv))


if __name__ == "__main__":
    main()
