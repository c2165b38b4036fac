"""Where a run's time goes, stage by stage, beside the floor that its matrix products set: `--profile`.

The floor of a stage is the time that its matrix products alone would take at the rate at which this machine multiplies
large matrices in the run's precision and threads, measured at the start; a stage without products has none.
"""

import copy
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from domainbed_ext.models.precision import autocast

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm


STAGES = ("data wait", "augment", "forward", "backward", "optimizer", "evaluate", "write")
_ROWS, _TRIES = 4096, 7  # of the product that is timed


class Profile:
    """The clocks and counters of a run.

    Args:
        algorithm: that the run trains; a copy of it counts the operations.
        minibatch: of every training environment, images [n, channels, height, width] and labels [n].

    Attributes:
        images: how many were decoded, augmented, forwarded (in training), backwarded and evaluated.
        seconds: by stage.
        operations: floating-point operations of the products of one image, by stage.
        rate: operations a second of a large product.
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
        """A `Stage`. On a GPU it waits for what it started, which costs the run some of its overlap."""
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

    def floor(self, stage: str) -> float:
        """Seconds that the products of a stage's images take at the measured rate."""
        counted = {"forward": "forwarded", "backward": "backwarded", "evaluate": "evaluated"}.get(stage)
        return self.images[counted] * self.operations[stage] / self.rate if counted else 0.0

    def summary(self) -> dict[str, Any]:
        """What a record holds of it, up to now in this attempt.

        Returns:
            "gflop_per_s", "gflop_per_image" by stage, "images" by what was done to them, and "stages": of each
            "seconds", "floor" (seconds) and, where there is a floor, "ratio".
        """
        stages = {}
        for name in STAGES:
            seconds, floor = self.seconds[name], self.floor(name)
            stages[name] = {"seconds": seconds, "floor": floor, **({"ratio": seconds / floor} if floor else {})}
        return {
            "gflop_per_s": self.rate / 1e9,
            "gflop_per_image": {name: value / 1e9 for name, value in self.operations.items()},
            "images": dict(self.images),
            "stages": stages,
        }

    def table(self) -> str:
        """The summary in words."""
        found = self.summary()
        lines = [f"{'stage':10} {'seconds':>9} {'floor':>9} {'ratio':>6}"]
        stages = found["stages"]
        stages["all"] = {key: sum(stage[key] for stage in stages.values()) for key in ("seconds", "floor")}
        if stages["all"]["floor"]:
            stages["all"]["ratio"] = stages["all"]["seconds"] / stages["all"]["floor"]
        for name, stage in stages.items():
            floor = f"{stage['floor']:9.2f} {stage['ratio']:6.2f}" if "ratio" in stage else f"{'':>9} {'':>6}"
            lines.append(f"{name:10} {stage['seconds']:9.2f} {floor}".rstrip())
        counted = ", ".join(f"{count:,} {name}" for name, count in found["images"].items() if count)
        lines.append(f"images: {counted}; products at {found['gflop_per_s']:.0f} GFLOP/s")
        return "\n".join(lines)


def operations(algorithm: "Algorithm", minibatch: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Floating-point operations of the matrix products of one image, counted on a copy.

    Args:
        algorithm: any.
        minibatch: of every training environment, images [n, ...] and labels [n].

    Returns:
        Of "forward", "backward" (whatever an update does beside) and "evaluate".
    """
    algorithm = copy.deepcopy(algorithm)
    images = torch.cat([x for x, _ in minibatch]).to(algorithm.device)
    with FlopCounterMode(display=False) as update:
        algorithm.update(minibatch)
    context = autocast(algorithm.precision, algorithm.device)
    with FlopCounterMode(display=False) as forward, torch.no_grad(), context:
        algorithm.logits(images)
    algorithm.eval()
    with FlopCounterMode(display=False) as evaluate, torch.no_grad():
        algorithm.predict(images)
    counted = {"forward": forward, "backward": update, "evaluate": evaluate}
    each = {name: counter.get_total_flops() / len(images) for name, counter in counted.items()}
    return each | {"backward": max(0.0, each["backward"] - each["forward"])}


def product_rate(algorithm: "Algorithm") -> float:
    """Operations a second of a product with the largest weight of any linear layer, the fastest of some.

    Args:
        algorithm: whose precision and device are taken.
    """
    weights = [module.weight for module in algorithm.modules() if isinstance(module, nn.Linear)]
    outputs, inputs = max((weight.shape for weight in weights), key=lambda shape: shape.numel())
    dtype = torch.bfloat16 if algorithm.precision == "bf16" else torch.float32
    x = torch.ones(_ROWS, inputs, dtype=dtype, device=algorithm.device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=algorithm.device)
    fastest = float("inf")
    for _ in range(_TRIES):
        wait(algorithm.device)
        start = time.perf_counter()
        x @ weight.T
        wait(algorithm.device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * _ROWS * inputs * outputs / fastest


def wait(device: torch.device) -> None:
    """Waits until a GPU has done what it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
