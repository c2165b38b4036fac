"""One run: trains an algorithm on all environments but the test ones, and records its accuracy on every split.

python -m domainbed_ext.train --algorithm BOnly --test_envs 0 --output_dir runs/one

A run that was stopped or killed resumes from its last checkpoint, to the same records and the same adapter: run the
same command again.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace

from domainbed_ext import hparams_registry
from domainbed_ext.algorithms.names import canonical_name
from domainbed_ext.data import duplicates
from domainbed_ext.datasets.environment_names import declared_environments
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.divergence import Diverged
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.protocols import DOMAINBED, find_test_envs
from domainbed_ext.runs.arguments import RunArguments, format_config, parse_words
from domainbed_ext.runs.device_errors import OutOfMemory, explain
from domainbed_ext.runs.differences import Kind, differences
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.imports import load
from domainbed_ext.system import garbage
from domainbed_ext.system.attempts import Claim, Lost, Taken
from domainbed_ext.system.command_line import RESUME, as_command
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import Interrupted, OutOfTime, stoppable
from domainbed_ext.system.progress import bar, display
from domainbed_ext.trackers.registry import check_trackers

Progress = Callable[[float], None]
"""Function that is told the share of the steps that are done."""


def run(args: RunArguments, progress: Progress = lambda share: None) -> ExitCode:
    """Does a run, from its arguments to its `done` or `failed`.

    Args:
        args: Arguments of the run.
        progress: Function that is told the share of the steps that are done.

    Returns:
        Exit code of the run.

    Raises:
        BenchmarkError: The folder cannot be written, or holds another run that is done.
    """
    folder = RunFolder(args.output_dir)
    if folder.state is State.DONE:
        return _done_already(args, folder)
    try:
        claim = folder.claim()
    except Taken as taken:
        print(f"warning: {taken}: the run is left to it", file=sys.stderr)
        return ExitCode.TAKEN
    with claim:
        if folder.state is State.DONE:  # just now, by another process
            claim.ended = "done"
            return ExitCode.DONE
        return _attempt(args, folder, claim, progress)


def _done_already(args: RunArguments, folder: RunFolder) -> ExitCode:
    """Accepts a finished run of the same computation; versions, precision and source files may have changed since."""
    with garbage.loading():
        from domainbed_ext.runs.setup import collect_facts, set_up  # torch, which takes seconds

    record = folder.records()[-1]
    different = differences(record, collect_facts(set_up(args)))
    if "data_digest" not in record:
        print(f"warning: {folder.path} does not record its data: taken as the data here", file=sys.stderr)
    for kind, words in different.items():
        if kind in (Kind.ARGUMENTS, Kind.DATA, Kind.WEIGHTS):
            raise BenchmarkError(
                f"{folder.path} holds a finished run of other {kind.value} ({words}): give another --output_dir, or "
                f"the {kind.value} of that run"
            )
        print(f"warning: {folder.path} is of other {kind.value} ({words}): accepted as it is", file=sys.stderr)
    print(f"{folder.path} is done already")
    return ExitCode.DONE


def _attempt(args: RunArguments, folder: RunFolder, claim: Claim, progress: Progress) -> ExitCode:
    with garbage.loading():
        from domainbed_ext.runs.formatting import format_closing
        from domainbed_ext.runs.setup import set_up
        from domainbed_ext.runs.training import Training

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
                duplicates.search(setup.args.dataset, setup.dataset, args.duplicates, args.cache_dir)
                training = Training(setup, folder, claim, stop)
            training.finish(progress)
            claim.check()
            folder.finish()
            claim.ended = "done"
            print(format_closing(folder.records(), folder.path))
            return ExitCode.DONE
        except OutOfTime as error:
            return fail(error, f"{error}: give it a longer --time_limit, and it resumes", ExitCode.FAILED)
        except (Interrupted, KeyboardInterrupt) as interrupted:
            reason = f" ({interrupted})" if str(interrupted) else ""
            print(f"interrupted{reason}: {RESUME}", file=sys.stderr)
            return ExitCode.INTERRUPTED
        except Lost as lost:
            print(f"warning: {lost}: the run is left to it", file=sys.stderr)
            return ExitCode.TAKEN
        except (Diverged, OutOfMemory) as error:
            return fail(error, str(error), ExitCode.FAILED)
        except BenchmarkError as error:
            return fail(error, str(error), ExitCode.BAD_INPUT)
        except OSError as error:  # a full disk, a folder that became read-only
            traceback.print_exc()
            where = error.filename or folder.path
            return fail(error, f"{error.strerror or error}: {where}; fix that, and it resumes", ExitCode.FAILED)
        except Exception as error:
            if (sentence := explain(error)) is not None:
                return fail(BenchmarkError(sentence), sentence, ExitCode.FAILED)
            traceback.print_exc()
            return fail(error, f"{type(error).__name__}: {error}", ExitCode.FAILED)


def check_arguments(args: RunArguments) -> None:
    """Refuses mistakes that can be found without torch, which takes seconds to load.

    Args:
        args: Arguments of the run.

    Raises:
        BenchmarkError: An algorithm, a data set, a test environment, a hyperparameter or a tracker that does not exist,
            a value out of its range, or no folder of images.
    """
    load(args.imports)
    dataset = DATASETS.canonical(args.dataset)
    canonical_name(args.algorithm)
    hparams_registry.check(args.complete().resolve_hparams())
    if args.test_envs is not None and (names := declared_environments(dataset)):
        find_test_envs(dataset, names, args.test_envs)
    DATASETS[dataset].check_data_dir(args.data_dir)
    check_trackers(args.track)


def skip_first_evaluation(args: RunArguments) -> RunArguments:
    """Leaves out the evaluation after the first step of a run that is too short for any but that and the last.

    DomainBed evaluates after the first step, which costs such a run more than its training. Runs of sweeps keep it, so
    that their records stay as they are: their commands say `--evaluate_first_step`.

    Args:
        args: Arguments of the run.

    Returns:
        The same; with `--checkpoint_freq 0` where that is the case and not chosen otherwise.
    """
    chosen = args.checkpoint_freq is not None or args.evaluations is not None or args.evaluate_first_step
    if args.steps is None or chosen or args.protocol == DOMAINBED:
        return args
    frequency = DATASETS[DATASETS.canonical(args.dataset)].CHECKPOINT_FREQ
    if not 1 < args.steps <= frequency:
        return args
    print(
        f"--steps {args.steps} is at most the {frequency} of --checkpoint_freq: the run is evaluated at its last step "
        "alone (--evaluate_first_step adds the first, --checkpoint_freq others)"
    )
    return replace(args, checkpoint_freq=0)


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.train`."""
    words = parse_words(argv)
    args = RunArguments.from_mapping(vars(words))
    check_arguments(args)
    if words.print_config:
        print(format_config(args), end="")
        return ExitCode.DONE
    return run(skip_first_evaluation(args))


if __name__ == "__main__":
    main()
