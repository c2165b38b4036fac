"""Time of a run by stage, compared with the lower bound of its matmuls: `--profile`.

The lower bound of a stage is the time that its matmuls alone would take at the rate of large matmuls on this machine in
the run's precision and threads, measured at the start; a stage without matmuls has none. Records call it "floor".
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter

from domainbed_ext.models.precision import DTYPES, autocast
from vitlorafa import QuantisedLinear

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm


STAGES = ("data wait", "augment", "forward", "backward", "optimizer", "evaluate", "write")
_ROWS, _TRIES = 4096, 7  # of the matmul that is timed
_ROWS_ON_GPU = 65536  # with fewer, launching it would take a good part of the time
_aten = torch.ops.aten
# Attention on a CPU, which torch's own table of formulas lacks. Formulas get shapes.
_UNCOUNTED = {
    _aten.baddbmm_: lambda _, left, right, **__: flop_counter.bmm_flop(left, right),
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: flop_counter.sdpa_flop_count(*qkv[:3]),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *gqkv, **_: flop_counter.sdpa_backward_flop_count(*gqkv[:4])
    ),
}


class Profile:
    """Timers and counters of a run.

    Args:
        algorithm: Algorithm of the run; a copy of it counts the operations.
        minibatch: Images [n, channels, height, width] and labels [n] of every training environment.

    Attributes:
        images: Number of images that were decoded, augmented, forwarded (in training), backwarded and evaluated.
        seconds: Time by stage.
        operations: Floating-point operations of the matmuls of one image, by stage.
        rate: Operations per second of a large matmul.
    """

    def __init__(self, algorithm: "Algorithm", minibatch: list[tuple[Tensor, Tensor]]) -> None:
        self.images: Counter[str] = Counter()
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.device = algorithm.device
        self.operations = operations(algorithm, minibatch)
        self.rate = product_rate(algorithm)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage. On a GPU it waits until the work is done, which costs some overlap."""
        self._credit()
        self._open.append(name)
        try:
            yield
        finally:
            self._credit()
            self._open.pop()

    def _credit(self) -> None:
        wait(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def lower_bound(self, stage: str) -> float:
        """Seconds that the matmuls of a stage's images take at the measured rate."""
        counted = {"forward": "forwarded", "backward": "backwarded", "evaluate": "evaluated"}.get(stage)
        return self.images[counted] * self.operations[stage] / self.rate if counted else 0.0

    def summary(self) -> dict[str, Any]:
        """Summarises the attempt so far, for a record.

        Returns:
            "gflop_per_s", "gflop_per_image" by stage, "images" by what was done to them, and "stages": for each
            "seconds", "floor" (the lower bound in seconds) and, if there is one, "ratio".
        """
        stages = {}
        for name in STAGES:
            seconds, floor = self.seconds[name], self.lower_bound(name)
            stages[name] = {"seconds": seconds, "floor": floor, **({"ratio": seconds / floor} if floor else {})}
        return {
            "gflop_per_s": self.rate / 1e9,
            "gflop_per_image": {name: value / 1e9 for name, value in self.operations.items()},
            "images": dict(self.images),
            "stages": stages,
        }

    def table(self) -> str:
        """Formats the summary as a table."""
        summary = self.summary()
        lines = [f"{'stage':10} {'seconds':>9} {'bound':>9} {'ratio':>6}"]
        stages = summary["stages"]
        stages["all"] = {key: sum(stage[key] for stage in stages.values()) for key in ("seconds", "floor")}
        if stages["all"]["floor"]:
            stages["all"]["ratio"] = stages["all"]["seconds"] / stages["all"]["floor"]
        for name, stage in stages.items():
            floor = f"{stage['floor']:9.2f} {stage['ratio']:6.2f}" if "ratio" in stage else f"{'':>9} {'':>6}"
            lines.append(f"{name:10} {stage['seconds']:9.2f} {floor}".rstrip())
        counted = ", ".join(f"{count:,} {name}" for name, count in summary["images"].items() if count)
        lines.append(f"images: {counted}; matmuls at {summary['gflop_per_s']:.0f} GFLOP/s")
        return "\n".join(lines)


def operations(algorithm: "Algorithm", minibatch: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Counts the floating-point operations of the matmuls of one image, on a copy of the algorithm.

    Args:
        algorithm: Any algorithm.
        minibatch: Images [n, ...] and labels [n] of every training environment.

    Returns:
        Operations of "forward", "backward" (everything else in an update) and "evaluate".
    """
    algorithm = copy.deepcopy(algorithm)
    images = torch.cat([x for x, _ in minibatch]).to(algorithm.device)
    with _counter() as update:
        algorithm.update(minibatch)
    context = autocast(algorithm.precision, algorithm.device)
    with _counter() as forward, torch.no_grad(), context:
        algorithm.logits(images)
    algorithm.eval()
    with _counter() as evaluate, torch.no_grad():
        algorithm.predict(images)
    counted = {"forward": forward, "backward": update, "evaluate": evaluate}
    each = {name: counter.get_total_flops() / len(images) for name, counter in counted.items()}
    return each | {"backward": max(0.0, each["backward"] - each["forward"])}


def _counter() -> flop_counter.FlopCounterMode:
    return flop_counter.FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)


def product_rate(algorithm: "Algorithm") -> float:
    """Measures operations per second of a matmul with the largest weight of any linear layer, the fastest of some.

    Args:
        algorithm: Algorithm with the precision and the device of the run.
    """
    layers = [module for module in algorithm.modules() if isinstance(module, (nn.Linear, QuantisedLinear))]
    outputs, inputs = max(((each.out_features, each.in_features) for each in layers), key=math.prod)
    dtype = DTYPES[algorithm.precision]
    rows = _ROWS if algorithm.device.type == "cpu" else _ROWS_ON_GPU
    # Random numbers: a GPU multiplies ones faster, because they need less power. The run's generators stay as they are.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(algorithm.device, dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(algorithm.device, dtype)
    fastest = float("inf")
    for _ in range(_TRIES):
        wait(algorithm.device)
        start = time.perf_counter()
        x @ weight.T
        wait(algorithm.device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * rows * inputs * outputs / fastest


def wait(device: torch.device) -> None:
    """Waits until a GPU has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
