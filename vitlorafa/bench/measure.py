"""Time, kept bytes and peak memory of one training step."""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vitlorafa.bench.case import CLASSES, PRECISIONS, Case
from vitlorafa.bench.formulas import Stack
from vitlorafa.bench.methods import METHODS, Setup, build, count

MIB = 2**20
_STATUS = Path("/proc/self/status")


@dataclass
class Times:
    """Seconds of each round of a method in a case.

    Attributes:
        case: Case that was run.
        method: Name in `METHODS`.
        trainable: Number of trainable parameters.
        flops: Operations of a step by formula; None without a formula.
        forward: Seconds of the forward pass in each round.
        backward: Seconds of the backward pass in each round.
        optimizer: Seconds of the optimizer's step in each round.
    """

    case: Case
    method: str
    trainable: int
    flops: int | None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    @property
    def step(self) -> list[float]:
        """Seconds of the whole step in each round."""
        return [sum(parts) for parts in zip(self.forward, self.backward, self.optimizer, strict=True)]

    def ratio(self, other: "Times") -> float:
        """The median over rounds of this method's step time divided by the other's."""
        return statistics.median(own / reference for own, reference in zip(self.step, other.step, strict=True))


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps from forward to backward, without parameters.

    Attributes:
        activations: Bytes that grow with the batch.
        weights: Bytes that do not: copies of weights in another precision, or weights with a merged update.
    """

    activations: int
    weights: int


@dataclass(frozen=True)
class Peak:
    """Largest memory use during a step in bytes; None where the system does not report it.

    Attributes:
        total: Increase since before the model was built.
        step: Increase since before the step.
    """

    total: int | None
    step: int | None


@dataclass(frozen=True)
class Memory:
    """Memory of a method in a case.

    Attributes:
        case: Case that was run.
        method: Name in `METHODS`.
        saved: Bytes kept for backward.
        formula: Bytes of kept activations by formula; None without a formula.
        peak: Largest memory use.
    """

    case: Case
    method: str
    saved: Saved
    formula: int | None
    peak: Peak


def make_batch(case: Case, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Random images and labels on the case's device, the same in every call.

    Args:
        case: Case with resolution, batch size and device.
        size: Number of images; if None, the case's batch size.
    """
    generator = torch.Generator().manual_seed(0)
    size = size or case.batch_size
    images = torch.randn(size, 3, case.resolution, case.resolution, generator=generator)
    return images.to(case.device), torch.randint(CLASSES, (size,), generator=generator).to(case.device)


def train_step(setup: Setup, case: Case, images: Tensor, labels: Tensor, mark: Callable[[], object]) -> list[Any]:
    """One training step.

    Args:
        setup: Model and optimizer.
        case: Case with precision and device.
        images: Images, [B, 3, H, W].
        labels: Labels, [B].
        mark: Function that is called before forward, backward and the optimizer's step, and at the end.

    Returns:
        The four results of `mark`.
    """
    marks = [mark()]
    loss = _loss(setup.model, case, images, labels)
    marks.append(mark())
    loss.backward()
    marks.append(mark())
    if setup.optimizer is not None:
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    marks.append(mark())
    return marks


def time_steps(
    setups: dict[str, Setup],
    case: Case,
    repeats: int,
    warmup: int,
    advance: Callable[[], None],
    stack: Stack | None = None,
) -> list[Times]:
    """Times the steps of several methods, interleaved.

    Args:
        setups: Model and optimizer of each method.
        case: Case that they train in.
        repeats: Number of rounds that count; in each, every method takes one step.
        warmup: Number of rounds before them.
        advance: Function that is called after every step.
        stack: Sizes of the model for the formula; None without a formula.

    Returns:
        The times of each method, in the order of `setups`.
    """
    images, labels = make_batch(case)
    times = [Times(case, method, setup.trainable, count(method, case, stack)[0]) for method, setup in setups.items()]
    cuda = torch.device(case.device).type == "cuda"
    for round_ in range(-warmup, repeats):
        first = round_ % len(times)
        for record in times[first:] + times[:first]:
            marks = train_step(setups[record.method], case, images, labels, _cuda_mark if cuda else time.perf_counter)
            if cuda:
                torch.cuda.synchronize()
                seconds = [begin.elapsed_time(end) / 1000 for begin, end in pairwise(marks)]
            else:
                seconds = [end - begin for begin, end in pairwise(marks)]
            if round_ >= 0:
                record.forward.append(seconds[0])
                record.backward.append(seconds[1])
                record.optimizer.append(seconds[2])
            advance()
    return times


def measure_saved(setup: Setup, case: Case) -> Saved:
    """The bytes kept from forward to backward; a second batch size separates activations from weights.

    Args:
        setup: Model and optimizer.
        case: Case with batch size, precision and device.
    """
    size = case.batch_size
    other = max(size // 2, 1) if size > 1 else 2
    total, other_total = (_saved_bytes(setup, case, images) for images in (size, other))
    activations = (total - other_total) * size // (size - other)
    return Saved(activations, total - activations)


def measure_peak(method: str, case: Case) -> Peak:
    """The largest memory use during a step; on a CPU, of a new process.

    Args:
        method: Name in `METHODS`.
        case: Case to train in.

    Raises:
        RuntimeError: If the process fails.
    """
    if torch.device(case.device).type == "cuda":
        return _peak_here(method, case)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        # Freed tensors return to the system immediately; otherwise the peak depends on what ran before.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    task = json.dumps({"method": method, "case": case.to_dict(), "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "vitlorafa.bench.measure"]
    child = subprocess.run(command, input=task, capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        label = METHODS[method].label
        raise RuntimeError(f"the process that measures the peak memory of {label} failed: {lines[-1]}")
    return Peak(**json.loads(child.stdout.splitlines()[-1]))


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor: one, or those of indices and values if it is sparse."""
    parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
    return [part.untyped_storage() for part in parts]


def _cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _loss(model: nn.Module, case: Case, images: Tensor, labels: Tensor) -> Tensor:
    dtype = PRECISIONS[case.precision]
    with torch.autocast(torch.device(case.device).type, dtype=dtype, enabled=dtype is not None):
        logits = model(images)
    return nn.functional.cross_entropy(logits.float(), labels)


class _Kept:
    """A tensor that autograd keeps; the graph alone refers to it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _saved_bytes(setup: Setup, case: Case, size: int) -> int:
    model = setup.model
    kept: WeakSet[_Kept] = WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        # Detached, because a node that holds its own output would never be freed.
        packed = _Kept(tensor.detach())
        kept.add(packed)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        loss = _loss(model, case, *make_batch(case, size))
    # After forward: what was saved for a graph that is gone does not count, and a buffer that was replaced is none.
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages = {storage.data_ptr(): storage.nbytes() for each in kept for storage in storages_of(each.tensor)}
    del loss
    return sum(nbytes for address, nbytes in storages.items() if address not in owned)


def _peak_here(method: str, case: Case) -> Peak:
    memory = _CudaMemory() if torch.device(case.device).type == "cuda" else _ResidentMemory()
    # The first step of any size loads libraries and kernels, whose memory is not the method's.
    tiny = replace(case, batch_size=1, depth=1)
    train_step(build(method, tiny), tiny, *make_batch(tiny), lambda: None)
    memory.settle()
    empty = memory.held()
    setup = build(method, case)
    images, labels = make_batch(case)
    train_step(setup, case, images, labels, lambda: None)  # creates the optimizer's state
    memory.settle()
    before = memory.held()
    for _ in range(2):
        train_step(setup, case, images, labels, lambda: None)
    top = memory.peak()
    if top is None or before is None or empty is None:
        return Peak(None, None)
    return Peak(top - empty, top - before)


class _CudaMemory:
    """Memory of tensors on the GPU, as torch counts it."""

    def settle(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def held(self) -> int | None:
        return torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated()


class _ResidentMemory:
    """Resident memory of this process, as Linux counts it."""

    def settle(self) -> None:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc's
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak

    def held(self) -> int | None:
        return self._read("VmRSS")

    def peak(self) -> int | None:
        return self._read("VmHWM")

    def _read(self, name: str) -> int | None:
        lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.exists() else []
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _child() -> None:
    """Measures the peak memory of the method and case in standard input, and prints it."""
    task = json.loads(sys.stdin.read())
    torch.set_num_threads(task["threads"])
    result = _peak_here(task["method"], Case.from_dict(task["case"]))
    print(json.dumps({"total": result.total, "step": result.step}))


if __name__ == "__main__":
    _child()
