"""The fastest of several exact ways to compute something, found by timing them once on this machine.

Some results can be computed in several ways that differ in nothing but rounding: attention by torch's fused kernel or
by batched matmuls, a bias after the matmul or within it. Which way is the fastest depends on the processor, the number
format and the shape. So the ways are timed, once: the answer is kept in a file of this machine, which every later
process reads. A question is answered by the first of these that has an answer:

1. the ways of a run that is resumed or evaluated again: `pin`
2. the user: `use_ways`, or the environment variable VITLORAFA_WAYS
3. this machine's file, in the folder VITLORAFA_CACHE, or ~/.cache/vitlorafa
4. the clock: the ways are timed, one process at a time, and the answer is written to the file
5. torch's own way, the default: if VITLORAFA_TUNE is "off", if the file cannot be written, so that two runs on a
   machine never differ, and for problems too small to matter

The default stays unless another way is clearly faster, so that noise does not choose. There is one file for each
processor, limit on its instructions and version of torch. `python -m vitlorafa.bench tune` shows it.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import local
from typing import Any, TypeVar

import torch
from filelock import Timeout

from vitlorafa.errors import AdapterError, unknown, warn
from vitlorafa.kept_ways import Answer, MachineFile, machine_file

T = TypeVar("T")
Trials = Mapping[str, Callable[[], object]]
"""By way, a function that computes a sample of the problem in this way."""

KINDS = {
    "attention": "attention, softmax(s q kᵀ) v",
    "linear": "a linear layer, with GELU or without",
    "patches": "the patch embedding, a convolution whose patches do not overlap",
    "evaluation_batch": "the number of images in a batch that is evaluated",
    "precision": 'the number format of matmuls that "auto" stands for',
}
"""What is asked, by the first word of a question."""


@dataclass(frozen=True)
class Question:
    """Which way is the fastest for one kind of problem, of one shape.

    Attributes:
        kind: Name in `KINDS`.
        details: Number format, shape and number of threads.
        ways: Names of the ways that work on this machine; the first is the default.
        margin: Factor by which another way must be faster.
        seconds: Time to spend on each way.
        matters: Whether the problem is large enough to be timed.
        needs_file: Whether the question is only timed if the answer can be kept.
    """

    kind: str
    details: str
    ways: tuple[str, ...]
    margin: float = 1.05
    seconds: float = 0.06
    matters: bool = True
    needs_file: bool = True

    def __str__(self) -> str:
        return f"{self.kind}: {self.details}"


def describe(dtype: torch.dtype, shape: str, threads: int) -> str:
    """The details of a question.

    Args:
        dtype: Number format.
        shape: Shape, in words.
        threads: Number of threads.
    """
    return f"{str(dtype).removeprefix('torch.')}, {shape}, {threads} thread{'s' * (threads > 1)}"


def sampler(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """A function that draws random numbers for a sample, the same in every process, from a generator of its own.

    Args:
        dtype: Number format.

    Returns:
        A function of a shape that returns such a tensor on the CPU.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    return draw


def choose(question: Question, trials: Callable[[], Trials]) -> str:
    """The way to compute, see above. The first call for a question may take some tenths of a second.

    The caller's random state, autocast, gradient mode, operation counters and profilers do not notice the timing. Not
    to be called inside a compiler or torch.func's transforms.

    Args:
        question: What is asked.
        trials: Function that makes the ways' samples, with random numbers from a generator of its own. It may ask other
            questions, and run what is to be answered before the clock starts.

    Returns:
        One of the question's ways.
    """
    way = _state.used.get(question)
    if way is None:
        way = _answer(question, trials)
        if not _clock_runs():
            _state.used[question] = way
    return way


def pin(ways: Mapping[str, str]) -> None:
    """Starts a run, or resumes one: fixes its ways, and forgets those that were used before.

    Args:
        ways: Ways by question, as `answers` returned them in the run's first attempt; or by kind, for all questions of
            that kind. Empty for a run that starts. A way that does not exist on this machine is replaced by the
            default, with a warning.
    """
    _state.pinned = dict(ways)
    _state.used.clear()
    note({name: way for name, way in ways.items() if name not in KINDS})


def use_ways(ways: Mapping[str, str]) -> None:
    """Sets the ways of this process, in place of the fastest; those that were set before are forgotten.

    Args:
        ways: Ways by kind or by question, such as {"attention": "torch"}. The environment variable VITLORAFA_WAYS sets
            them at import, as JSON.

    Raises:
        AdapterError: If there is no such kind of question.
    """
    for name in ways:
        if (kind := name.partition(":")[0]) not in KINDS:
            raise unknown("kind of question", kind, KINDS)
    _state.preferred = dict(ways)
    _state.used.clear()


def answers() -> dict[str, str]:
    """The ways of a run, by question: those that were pinned and those that were used since.

    Without problems too small to matter, unless their ways were set.
    """
    return {
        str(question): way
        for question, way in _state.used.items()
        if way != question.ways[0] or (question.matters and len(question.ways) > 1)
    }


def note(ways: Mapping[str, str]) -> None:
    """Adds ways to `answers` that something kept from an earlier process was computed with.

    Args:
        ways: Ways by question.
    """
    for name, way in ways.items():
        kind, _, details = name.partition(": ")
        _state.used[Question(kind, details, ("", way))] = way


def identity() -> dict[str, Any]:
    """What all ways follow from: a token of this machine's file, and pinned or set ways that differ from it.

    Answers in the file never change under one token, so results that were computed under equal identities agree.
    """
    fixed = {**_state.preferred, **_state.pinned}
    if not is_on():
        return {"token": None, "fixed": fixed}
    file = machine_file()
    kept = file.read()
    if not file.token:
        with contextlib.suppress(OSError, Timeout), file.alone():
            file.write(file.read())
    return {
        "token": file.token,
        "fixed": {name: way for name, way in fixed.items() if name not in kept or kept[name].way != way},
    }


def forget() -> None:
    """Deletes this machine's file, so that everything is timed again.

    Raises:
        OSError: If it cannot be deleted.
    """
    machine_file().forget()
    _state.used.clear()


def is_on() -> bool:
    """Whether ways are timed: unless VITLORAFA_TUNE is "off"."""
    return os.environ.get("VITLORAFA_TUNE", "").lower() not in ("off", "0", "no", "false")


def size_class(size: int, largest: int) -> int:
    """The size of a sample: the largest power of two that exceeds neither, so that few sizes are timed.

    Args:
        size: Size of the problem, at least 1.
        largest: Largest size that is timed.
    """
    return 1 << (max(1, min(size, largest)).bit_length() - 1)


def apart(function: Callable[[], T]) -> T:
    """Runs a function in a new thread, with as many threads of torch as this one.

    The caller's autocast, gradient mode, operation counters, hooks and profilers do not apply there.

    Args:
        function: Function without arguments.
    """
    threads = torch.get_num_threads()

    def run() -> T:
        torch.set_num_threads(threads)
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@dataclass
class _State:
    """What this process knows."""

    pinned: dict[str, str] = field(default_factory=dict)
    preferred: dict[str, str] = field(default_factory=dict)
    used: dict[Question, str] = field(default_factory=dict)
    unkept: dict[str, str] = field(default_factory=dict)
    is_writable: bool = True


def _answer(question: Question, trials: Callable[[], Trials]) -> str:
    name, default = str(question), question.ways[0]
    for fixed in (_state.pinned, _state.preferred):
        way = fixed.get(name, fixed.get(question.kind))
        if way in question.ways:
            return way
        if way is not None:
            choices = ", ".join(question.ways)
            warn(f"{name}: there is no way {way!r} here, only {choices}: {default} is used")
            return default
    if not question.matters or len(question.ways) == 1 or not is_on():
        return default
    file = machine_file()
    kept = file.read().get(name)
    if kept is not None and kept.way in question.ways:
        return kept.way
    if name in _state.unkept or _clock_runs():
        return _state.unkept.get(name, default)
    return _measure_and_keep(question, trials, file)


def _measure_and_keep(question: Question, trials: Callable[[], Trials], file: MachineFile) -> str:
    """Times the ways, unless another process has just done so."""
    name = str(question)
    if not _state.is_writable:
        return _without_file(question, trials)
    try:
        with file.alone():
            pass  # before anything is computed: fails if the answer cannot be kept
        samples = apart(trials)
        with file.alone():
            found = file.read()
            if name not in found or found[name].way not in question.ways:
                found[name] = _measure(question, samples)
                file.write(found)
            return found[name].way
    except (OSError, Timeout) as error:
        where = f" to {file.path}" if file.path else ""
        reason = getattr(error, "strerror", None) or error
        warn(
            f"the fastest ways to compute cannot be written{where} ({reason}): they are not timed, and torch's own are "
            "used; set VITLORAFA_CACHE to a folder that can be written"
        )
        _state.is_writable = False
        return _without_file(question, trials)


def _without_file(question: Question, trials: Callable[[], Trials]) -> str:
    if question.needs_file:
        return question.ways[0]
    return _state.unkept.setdefault(str(question), _measure(question, apart(trials)).way)


def _measure(question: Question, trials: Trials) -> Answer:
    """The fastest way by the shortest time of each; the default if none is faster by the margin."""
    seconds = apart(lambda: _time(trials, question.ways[0], question.seconds * len(question.ways)))
    way = question.ways[0]
    for other in question.ways[1:]:
        if way in seconds and other in seconds and seconds[way] > question.margin * seconds[other]:
            way = other
    return Answer(way, {name: float(f"{seconds[name]:.3g}") for name in question.ways if name in seconds})


def _time(trials: Trials, default: str, budget: float) -> dict[str, float]:
    """The shortest time of each way, called interleaved; without ways that fail or come too late in the first turn.

    Args:
        trials: Samples by way. One that computes k times as much as another returns k as a float.
        default: The way without which the others are not timed.
        budget: Seconds for all of them, of which a few calls of a slow way may take more.
    """
    seconds: dict[str, float] = {}
    remaining = dict(trials)
    _in_thread.clock_runs = True
    began = _clock()
    for turn in range(_MOST_CALLS):
        for name, compute in list(remaining.items()):
            start = _clock()
            try:
                if turn == 0 and start - began > budget:
                    raise TimeoutError
                done = compute()
            except Exception:  # such as an operation that oneDNN refuses
                del remaining[name]
                seconds.pop(name, None)
                continue
            taken = (_clock() - start) / (done if isinstance(done, float) else 1.0)
            seconds[name] = min(taken, seconds.get(name, taken))
        if default not in remaining:
            return {}
        if turn >= _FEWEST_CALLS - 1 and _clock() - began > budget:
            break
    return seconds


def _clock() -> float:
    """Seconds; with one thread of processor time, of which other processes take nothing."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _clock_runs() -> bool:
    """Whether this is a sample that is being timed, which must not start another timing."""
    return getattr(_in_thread, "clock_runs", False)


def _read_environment() -> dict[str, str]:
    text = os.environ.get("VITLORAFA_WAYS") or "{}"
    try:
        ways = json.loads(text)
    except ValueError:
        ways = None
    if not isinstance(ways, dict):
        raise AdapterError(
            f'VITLORAFA_WAYS={text} is no JSON object: give it ways by kind, as {{"attention": "torch"}}'
        )
    return ways


# Of each way; the first warms up. Short samples are called more often, so that a slow moment of a virtual machine, in
# which bfloat16 once took ten times as long, does not decide.
_FEWEST_CALLS, _MOST_CALLS = 3, 16
_in_thread = local()
_state = _State()
use_ways(_read_environment())
