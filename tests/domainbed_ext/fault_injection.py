"""Runs in processes of their own that can be killed, and what is left of them afterwards.

A kill costs no import: see `tests.forked`.
"""

import contextlib
import json
import os
import random
import shlex
import signal
import time
from pathlib import Path

from domainbed_ext import train
from domainbed_ext.algorithms.lora import BA
from domainbed_ext.runs import arguments as options
from domainbed_ext.runs.feed import Feed
from domainbed_ext.system import interrupts
from tests.forked import CONTEXT

SHORT = (
    "--algorithm BA --steps 12 --checkpoint_freq 4 --save_steps 1 --train_eval_share 0.05 --holdout_fraction 0.1 "
    """--hparams '{"adapter_dropout": 0.1, "batch_size": 4}' --sampling epochs"""
)


def _work(words, pipe, before):
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        if before is not None:
            before()
        code = train.run(options.parse(words), pipe.send)
    os._exit(code)


class Run:
    """A run under way.

    Args:
        folder: its place.
        words: of its command line, over `SHORT`.
        before: called in its process before it starts; a function of a module.
    """

    def __init__(self, folder, *words, before=None):
        self.pipe, theirs = CONTEXT.Pipe(duplex=False)
        arguments = [*shlex.split(SHORT), *words, "--output_dir", str(folder)]
        self.process = CONTEXT.Process(target=_work, args=(arguments, theirs, before))
        self.process.start()
        theirs.close()

    def wait_for_step(self, steps):
        """Until so many of the steps of this attempt are done, or it has ended."""
        with contextlib.suppress(EOFError):
            for _ in range(steps):
                self.pipe.recv()

    def kill(self, number=signal.SIGKILL):
        """Sends a signal, unless it has ended; returns the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return self.end()

    def end(self):
        """Waits for the exit code."""
        self.process.join(300)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode


def kill_at_random(folder, seed, *words, kills=1000):
    """Kills a run with SIGKILL at random moments, again and again until it is done; returns the number of kills."""
    draw, killed = random.Random(seed), 0
    while not (folder / "done").exists():
        run = Run(folder, *words)
        if killed < kills:
            run.wait_for_step(draw.randint(0, 4))
            time.sleep(draw.random() * 0.3)
            killed += run.kill() == -signal.SIGKILL
        else:
            assert run.end() == 0
    return killed


def outcome(folder: Path):
    """What must not depend on how often a run was killed: everything but times, places and logs."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for record in records:
        del record["step_time"]
        for name in options.PLACES:
            del record["args"][name]
    saved = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.parent != folder or path.name.startswith("predictions"))
    }
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("attempt_"))
    return records, saved, names


# What a run's process may have done to it before it starts.


def hang_at_step_3():
    interrupts.GRACE = 0.5
    update = BA.update

    def hang(self, minibatches, unlabeled=None):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 4:
            time.sleep(1000)
        return update(self, minibatches, unlabeled)

    BA.update = hang


def allow_only_small_files():
    """As on a disk that has room for records, and none for a checkpoint (about a megabyte)."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def select_step(selected, replace=setattr):
    """Lets each run select a step: the nearer another is to it, the better its validation accuracies.

    Args:
        selected: index of the step.
        replace: of an attribute.
    """
    original = Feed.accuracies

    def accuracies(self, step, names, *logits):
        values = original(self, step, names, *logits)
        is_validation = list(names) == self.setup.validation_splits
        return dict.fromkeys(values, 1 / (1 + abs(step - selected))) if is_validation else values

    replace(Feed, "accuracies", accuracies)


def note_evaluations(replace=setattr):
    """Returns a list that takes (step, names of splits) of each evaluation."""
    original, noted = Feed.accuracies, []

    def accuracies(self, step, names, *logits):
        noted.append((step, list(names)))
        return original(self, step, names, *logits)

    replace(Feed, "accuracies", accuracies)
    return noted


def select_step_4():
    select_step(4)


def die_in_the_evaluation_of_step_4():
    """Of its other splits, which is when the run ends."""
    select_step(4)
    original = Feed.accuracies

    def accuracies(self, step, names, *logits):
        if step == 4 and list(names) != self.setup.validation_splits:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step, names, *logits)

    Feed.accuracies = accuracies
