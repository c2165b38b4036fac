"""Folders of runs that were never run, in every state there is."""

import contextlib
import json
import shlex
import subprocess
import sys

from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep import states
from domainbed_ext.sweep.arguments import parse
from domainbed_ext.system import attempts

SMALL = shlex.split(
    "--datasets DigitsShift --n_hparams 1 --n_trials 1 --single_test_envs --steps 2 --checkpoint_freq 0 "
    "--train_eval_share 0.05 --skip_confirmation --skip_model_save"
)
ELSEWHERE = {"host": "far", "boot": "x", "pids": "y", "pid": 7, "began": "1"}


def words(tmp_path, *more, command="launch", algorithms=("LP",)):
    """The command line of a small sweep: four runs an algorithm."""
    return [command, *SMALL, "--output_dir", str(tmp_path / "sweep"), "--algorithms", *algorithms, *more]


def make_jobs(tmp_path, *more, **options):
    return sweep_jobs.make_jobs(parse(words(tmp_path, *more, **options)))


def look(jobs):
    return states.read_statuses(jobs, jobs[0].sweep_dir)


def found(jobs):
    return [standing.state for standing in look(jobs)]


def attempt(job, number=1, ended=None, share=0.0, seconds=0.0, owner=ELSEWHERE, **more):
    """What an attempt leaves; one of another host that has not ended seems alive for a minute."""
    job.folder.path.mkdir(parents=True, exist_ok=True)
    told = {
        "owner": owner,
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": seconds,
        "set_up": 0.0,
        "share": share,
        "ended": ended,
        **more,
    }
    (job.folder.path / f"attempt_{number}.json").write_text(json.dumps(told))


def done(job, seconds=10.0, number=1):
    attempt(job, number, "done", 1.0, seconds)
    (job.folder.path / "done").write_text("done")


def failed(job, sentence="why", number=1):
    attempt(job, number, "failed")
    job.folder.fail(sentence)


def interrupted(job, share=0.5, seconds=10.0, number=1):
    attempt(job, number, "interrupted", share, seconds)


def running(job, share=0.5, seconds=10.0, **more):
    attempt(job, 1, None, share, seconds, **more)


@contextlib.contextmanager
def claimed_by_another_process(job):
    """A process that holds the claim on a run while the context lasts."""
    job.folder.path.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys; from pathlib import Path; from domainbed_ext.system.attempts import Claim\n"
        "with Claim(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(job.folder.path)], text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait()


def age(job, seconds=2 * attempts.LEASE, number=1):
    """Lets a heartbeat be old."""
    import os

    path = job.folder.path / f"attempt_{number}.json"
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))
