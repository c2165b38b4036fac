"""The matmul lower bound of a whole run: the time that its matmuls alone would take on this machine.

It is that of the defaults, whichever way a run goes, so that all ways are compared with the same seconds. The matmuls
are those of every image that the defaults must train on and evaluate at least: the held-out images of the training
environments at every checkpoint, and all other splits at the last step, which may be the selected one. Where features
of a frozen backbone replace images, they are in the cache. The rate is that of large matmuls with the run's threads
(`domainbed_ext.runs.profile`).
"""

import time
from dataclasses import dataclass

import torch

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.probe import LP
from domainbed_ext.runs.profile import operations, product_rate
from domainbed_ext.runs.remaining_time import RemainingTime
from domainbed_ext.runs.setup import Setup, set_up_process

MATMULS = ("float32", "bf16")
_IMAGES = 2  # whose operations are counted
_SECONDS = 3.0  # of measuring rates: the fastest of several times, since other load takes from them


@dataclass(frozen=True)
class Work:
    """The images of a run, and the operations of the matmuls of one.

    Attributes:
        trained: Number of images that are trained on.
        evaluated: Number of images that are evaluated at least.
        training: Operations of an image that is trained on.
        evaluation: Operations of an image that is evaluated.
    """

    trained: int
    evaluated: int
    training: float
    evaluation: float

    @property
    def operations(self) -> float:
        """Operations of the run."""
        return self.trained * self.training + self.evaluated * self.evaluation


@dataclass(frozen=True)
class LowerBound:
    """The matmul lower bound of a run.

    Attributes:
        work: Matmuls of the run.
        precision: Precision of the run.
        rates: Operations per second of large matmuls, by precision.
        threads: Number of threads of the run.
    """

    work: Work
    precision: str
    rates: dict[str, float]
    threads: int

    @property
    def seconds(self) -> float:
        """Seconds in the run's precision."""
        return self.work.operations / self.rates[self.precision]

    def describe(self) -> str:
        """Says in a sentence what it consists of, and what it is in each precision."""
        work = self.work
        by_precision = ", ".join(
            f"{work.operations / rate:.3g} s in {precision} at {rate / 1e9:,.0f} GFLOP/s"
            for precision, rate in self.rates.items()
        )
        return (
            f"Matmul lower bound, {self.threads} thread(s): {by_precision}. × lower bound: time over that of the "
            f"defaults' matmuls in {self.precision}, for every way. They train on {work.trained:,} images of "
            f"{work.training / 1e9:.1f} GFLOP and evaluate at least {work.evaluated:,} of {work.evaluation / 1e9:.1f}."
        )


def measure_lower_bound(setup: Setup) -> LowerBound:
    """Counts the matmuls of a run and measures their rate, in this process.

    Args:
        setup: Parts of a run with the defaults.
    """
    set_up_process(setup.args)
    algorithm = setup.make_algorithm()
    precision = algorithm.precision
    return LowerBound(count_work(setup, algorithm), precision, measure_rates(algorithm), setup.args.threads)


def count_work(setup: Setup, algorithm: Algorithm) -> Work:
    """Counts images and operations of a run.

    Args:
        setup: Parts of the run.
        algorithm: Algorithm of the run.
    """
    remaining = RemainingTime(setup)
    evaluations = remaining.count_evaluations(0)
    full = evaluations if setup.args.evaluate == "all" else 1
    images = torch.zeros(_IMAGES, *setup.inputs.shape, device=algorithm.device)
    evaluated_on = algorithm.embed(images) if isinstance(algorithm, LP) and algorithm.embeds else images
    trained_on = evaluated_on if setup.augmentation == "none" else images
    training, evaluation = (_operations(algorithm, inputs) for inputs in (trained_on, evaluated_on))
    return Work(
        setup.steps * setup.images_a_step,
        evaluations * remaining.validation + full * remaining.others,
        training["forward"] + training["backward"],
        evaluation["evaluate"],
    )


def measure_rates(algorithm: Algorithm) -> dict[str, float]:
    """Measures the operations per second of a large matmul of an algorithm, by precision.

    Args:
        algorithm: Algorithm; it keeps its precision.
    """
    before, rates = algorithm.precision, dict.fromkeys(MATMULS, 0.0)
    start = time.monotonic()
    while not all(rates.values()) or time.monotonic() - start < _SECONDS:
        for algorithm.precision in MATMULS:
            rates[algorithm.precision] = max(rates[algorithm.precision], product_rate(algorithm))
    algorithm.precision = before
    return rates


def _operations(algorithm: Algorithm, inputs: torch.Tensor) -> dict[str, float]:
    labels = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
    return operations(algorithm, [(inputs, labels)])
