"""One training step, its time, the bytes it keeps and the memory it peaks at."""

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

import torch
from torch import Tensor, nn

from vitlorafa.bench.floors import Stack
from vitlorafa.bench.methods import CLASSES, PRECISIONS, Case, Contestant, build, counted

MIB = 2**20
_STATUS = Path("/proc/self/status")


@dataclass
class Times:
    """Seconds of each round of a method in a case, with the step's operations by formula."""

    case: Case
    method: str
    trainable: int
    flops: int | None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    @property
    def step(self) -> list[float]:
        """The whole step's."""
        return [sum(parts) for parts in zip(self.forward, self.backward, self.optimizer, strict=True)]

    def ratio(self, other: "Times") -> float:
        """The median over rounds of this method's step over the other's."""
        return statistics.median(mine / its for mine, its in zip(self.step, other.step, strict=True))


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps from forward to backward, parameters left out.

    Attributes:
        activations: What grows with the batch.
        weights: What does not: copies of weights in another precision, or weights with an update added.
    """

    activations: int
    weights: int


@dataclass(frozen=True)
class Peak:
    """Bytes of memory at the worst moment of a step, None where they cannot be known.

    Attributes:
        total: Over what the process held before the model was built.
        step: Over what it held before the step.
    """

    total: int | None
    step: int | None


@dataclass(frozen=True)
class Memory:
    """What a method keeps and needs in a case, with the activations' bytes by formula."""

    case: Case
    method: str
    saved: Saved
    formula: int | None
    peak: Peak


def batch(case: Case, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Random images and labels, the same ones every time, on the case's device.

    Args:
        case: Resolution, batch size and device.
        size: Images, if not the case's.
    """
    generator = torch.Generator().manual_seed(0)
    size = size or case.batch_size
    images = torch.randn(size, 3, case.resolution, case.resolution, generator=generator)
    return images.to(case.device), torch.randint(CLASSES, (size,), generator=generator).to(case.device)


def step(contestant: Contestant, case: Case, images: Tensor, labels: Tensor, mark: Callable[[], object]) -> list[Any]:
    """One training step.

    Args:
        contestant: What trains.
        case: Precision and device.
        images: [B, 3, H, W].
        labels: [B].
        mark: Called before forward, backward and the optimizer, and at the end.

    Returns:
        The four results of `mark`.
    """
    marks = [mark()]
    loss = _loss(contestant.model, case, images, labels)
    marks.append(mark())
    loss.backward()
    marks.append(mark())
    if contestant.optimizer is not None:
        contestant.optimizer.step()
        contestant.optimizer.zero_grad()
    marks.append(mark())
    return marks


def time_steps(
    contestants: dict[str, Contestant],
    case: Case,
    repeats: int,
    warmup: int,
    advance: Callable[[], None],
    stack: Stack | None = None,
) -> list[Times]:
    """Times the steps of all contestants, interleaved.

    Args:
        contestants: By method.
        case: What they train.
        repeats: Rounds that count; in each, every contestant takes one step.
        warmup: Rounds before them.
        advance: Called after every step.
        stack: The model's sizes, for the formula.

    Returns:
        The times of each contestant, in their order.
    """
    images, labels = batch(case)
    times = [
        Times(case, method, contestant.trainable, counted(method, case, stack)[0])
        for method, contestant in contestants.items()
    ]
    cuda = torch.device(case.device).type == "cuda"
    for round_ in range(-warmup, repeats):
        first = round_ % len(times)
        for record in times[first:] + times[:first]:
            marks = step(contestants[record.method], case, images, labels, _cuda_mark if cuda else time.perf_counter)
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


def saved(contestant: Contestant, case: Case) -> Saved:
    """The bytes kept from forward to backward, told apart by another forward at another batch size.

    Args:
        contestant: What trains.
        case: Batch size, precision and device.
    """
    size = case.batch_size
    other = max(size // 2, 1) if size > 1 else 2
    mine, its = (_saved_bytes(contestant, case, images) for images in (size, other))
    activations = (mine - its) * size // (size - other)
    return Saved(activations, mine - activations)


def peak(method: str, case: Case) -> Peak:
    """The memory at the worst moment of a step: on a CPU, of a fresh process.

    Args:
        method: What to build.
        case: What it trains.

    Raises:
        RuntimeError: If the process fails.
    """
    if torch.device(case.device).type == "cuda":
        return _peak_here(method, case)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        # Freed tensors go back to the system at once; else the peak depends on what came before.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    task = json.dumps({"method": method, "case": case.to_dict(), "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "vitlorafa.bench.measure"]
    child = subprocess.run(command, input=task, capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise RuntimeError(f"the process that measures the peak memory of {method} failed: {lines[-1]}")
    return Peak(**json.loads(child.stdout.splitlines()[-1]))


def _cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _loss(model: nn.Module, case: Case, images: Tensor, labels: Tensor) -> Tensor:
    dtype = PRECISIONS[case.precision]
    with torch.autocast(torch.device(case.device).type, dtype=dtype, enabled=dtype is not None):
        logits = model(images)
    return nn.functional.cross_entropy(logits.float(), labels)


def _saved_bytes(contestant: Contestant, case: Case, size: int) -> int:
    model = contestant.model
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            sizes[storage.data_ptr()] = storage.nbytes()
        # Alive until the loss is gone, so that no address is used twice; detached, for a node that holds its own
        # output would never go.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, case, *batch(case, size))
    total = sum(sizes.values())
    del loss
    return total


def _peak_here(method: str, case: Case) -> Peak:
    memory = _CudaMemory() if torch.device(case.device).type == "cuda" else _ResidentMemory()
    # What a first step of any size loads, libraries and kernels, is not the method's.
    small = replace(case, batch_size=1, depth=1)
    step(build(method, small), small, *batch(small), lambda: None)
    memory.settle()
    empty = memory.held()
    contestant = build(method, case)
    images, labels = batch(case)
    step(contestant, case, images, labels, lambda: None)  # makes the optimizer's state
    memory.settle()
    before = memory.held()
    for _ in range(2):
        step(contestant, case, images, labels, lambda: None)
    top = memory.peak()
    if top is None or before is None or empty is None:
        return Peak(None, None)
    return Peak(top - empty, top - before)


class _CudaMemory:
    """What tensors occupy on the GPU, of which torch keeps count."""

    def settle(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def held(self) -> int | None:
        return torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated()


class _ResidentMemory:
    """What this process occupies, as Linux counts it."""

    def settle(self) -> None:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc's
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew

    def held(self) -> int | None:
        return self._read("VmRSS")

    def peak(self) -> int | None:
        return self._read("VmHWM")

    def _read(self, name: str) -> int | None:
        lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.exists() else []
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _child() -> None:
    """Measures the peak memory that standard input asks for, and prints it."""
    task = json.loads(sys.stdin.read())
    torch.set_num_threads(task["threads"])
    result = _peak_here(task["method"], Case.from_dict(task["case"]))
    print(json.dumps({"total": result.total, "step": result.step}))


if __name__ == "__main__":
    _child()
