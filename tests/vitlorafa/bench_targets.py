"""This project's own targets for its kernel, which the benchmark's users need not know.

Measure them on this machine: `python tests/vitlorafa/bench_targets.py` (some minutes).
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vitlorafa.bench.case import Case, stack_of
from vitlorafa.bench.formulas import rank_saved
from vitlorafa.bench.measure import Memory, Peak, Times, measure_saved, time_steps
from vitlorafa.bench.methods import METHODS, adapter_of, build
from vitlorafa.bench.tables import Row, table
from vitlorafa.config import TARGETS

STEP, KEPT, PEAK = "step time", "kept activations", "peak memory"


@dataclass(frozen=True)
class Target:
    """A ratio that LoRA-FA should not exceed in one case.

    Attributes:
        quantity: `STEP`, `KEPT` (the bytes of x Aᵀ come on top of what is allowed) or `PEAK`.
        against: Name of the method that it is compared with.
        at_most: Largest ratio.
        device: "cpu" or "cuda".
        model: Name of the timm model.
        batch_size: Number of images.
        rank: Rank of the adapter.
        dropouts: Dropout probabilities for which the target holds.
    """

    quantity: str
    against: str
    at_most: float
    device: str = "cpu"
    model: str = "vit_small_patch16_224"
    batch_size: int = 16
    rank: int = 8
    dropouts: tuple[float, ...] = (0.0,)

    def covers(self, case: Case) -> bool:
        """Whether the target is about a case."""
        return (
            (case.model, case.batch_size, case.rank) == (self.model, self.batch_size, self.rank)
            and (case.precision, case.resolution, case.targets, case.depth) == ("bf16", 224, TARGETS, None)
            and case.dropout in self.dropouts
            and torch.device(case.device).type == self.device
        )


BENCH_TARGETS = (
    Target(STEP, "lower_bound", 1.06),
    Target(STEP, "peft_lora_fa", 0.80),
    Target(STEP, "peft_lora", 0.73),
    Target(STEP, "lower_bound", 1.15, rank=64),
    Target(KEPT, "lower_bound", 1.01, dropouts=(0.0, 0.1)),
    Target(STEP, "lower_bound", 1.06, device="cuda", model="vit_base_patch16_224", batch_size=128),
    Target(PEAK, "peft_lora", 0.70, device="cuda", model="vit_base_patch16_224", batch_size=128),
)


def compare(times: Iterable[Times], memory: Iterable[Memory]) -> list[Row]:
    """One row for each target that the measurements are about: the limit, the measured ratio, and whether it is met.

    Args:
        times: Measured times.
        memory: Measured memory.
    """
    by_time = {(result.case, result.method): result for result in times}
    by_memory = {(result.case, result.method): result for result in memory}
    rows = []
    for target in BENCH_TARGETS:
        results: dict[Any, Any] = by_time if target.quantity == STEP else by_memory
        for (case, method), result in results.items():
            other = results.get((case, target.against))
            if not (target.covers(case) and METHODS[method].is_ours and METHODS[method].train == "B" and other):
                continue
            limit = f"{target.at_most:.2f} × {METHODS[target.against].label}"
            if target.quantity == STEP:
                ratio = result.ratio(other)
            elif target.quantity == PEAK:
                if None in (result.peak.total, other.peak.total):
                    continue
                ratio = result.peak.total / other.peak.total
            else:
                limit += " + x Aᵀ"
                stack = stack_of(case)
                own = rank_saved(stack, adapter_of(method, case)) if stack else 0
                ratio = (result.saved.activations - own) / other.saved.activations
            rows.append(
                {
                    "quantity": target.quantity,
                    "method": METHODS[method].label,
                    "case": str(case),
                    "at most": limit,
                    "measured": f"{ratio:.3f}",
                    "met": "yes" if ratio <= target.at_most else "no",
                }
            )
    return rows


def main() -> int:
    """Measures the targets of the CPU and prints which are met."""
    times: list[Times] = []
    memory: list[Memory] = []
    for rank in (8, 64):
        case = Case("vit_small_patch16_224", 16, 224, "bf16", rank, TARGETS)
        setups = {name: build(name, case) for name in ("lower_bound", "lora_fa", "peft_lora", "peft_lora_fa")}
        times += time_steps(setups, case, 12, 1, lambda: None)
        memory += [
            Memory(case, name, measure_saved(setup, case), None, Peak(None, None)) for name, setup in setups.items()
        ]
    print(table(compare(times, memory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
