"""The runs of a sweep that analyses are of, and their factors and weights as matrices.

These are the runs that training-domain validation selects, as in tables. Torch is imported only to load a run.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from domainbed_ext.algorithms.names import find_among, fixed_hyperparameters
from domainbed_ext.analyse.matrices import Matrix
from domainbed_ext.divergence import is_diverged
from domainbed_ext.errors import BenchmarkError, unknown, warn_once
from domainbed_ext.model_selection import TRAINING_DOMAIN, Record, training_environments
from domainbed_ext.models import conversions
from domainbed_ext.protocols import SINGLE_SOURCE, protocol_of
from domainbed_ext.report.methods import family_of
from domainbed_ext.report.results import Results
from domainbed_ext.runs.folder import RunFolder, load_finished
from domainbed_ext.runs.saved import BEST, Moved, Saved, SavedRun, find_saved, load_run
from domainbed_ext.system.progress import bar

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm

T = TypeVar("T")

ADAPTER = "adapter.json"  # in the folder of saved weights of a method with adapters
_FULL = ("FullFT", "ERM")  # methods that change all weights, the preferred one first
_DRAWN_BY = ("torch", "timm")  # whose versions a start may depend on


@dataclass(frozen=True)
class ChosenRun:
    """A run that training-domain validation selects.

    Attributes:
        run: Folder of the run.
        step: Which of its saved steps is analysed: "best", "last" or a number.
        moved: Where data, weights and the rest are now.
    """

    run: RunFolder
    step: str
    moved: Moved

    @cached_property
    def saved(self) -> Saved:
        """The record of the step, and the folder of what was trained by then.

        Raises:
            BenchmarkError: The run saved nothing at the step.
        """
        return find_saved(self.run, self.step)

    @property
    def record(self) -> Record:
        """The record of the step."""
        return self.saved.record

    @property
    def algorithm(self) -> str:
        """Id of the method."""
        return str(self.record["args"]["algorithm"])

    @property
    def method(self) -> str:
        """Id of the method without `adapter_seed`, which chooses a start and is not another method."""
        return without_setting(self.algorithm, "adapter_seed")

    @property
    def group(self) -> str:
        """What tables are apart by: the data set, and the protocol if it is not leave-one-out."""
        suffix = ", single source" if protocol_of(self.record) == SINGLE_SOURCE else ""
        return f"{self.record['args']['dataset']}{suffix}"

    @property
    def sources(self) -> tuple[int, ...]:
        """Indices of the environments that it was trained on."""
        return tuple(training_environments(self.record))

    @property
    def trial(self) -> int:
        """Seed of the trial."""
        return int(self.record["args"]["trial_seed"])

    @property
    def seed(self) -> int:
        """Seed of the run: of its minibatches, head and, without `adapter_seed`, adapter."""
        return int(self.record["args"]["seed"])

    @property
    def place(self) -> tuple[object, ...]:
        """What runs of different methods share that were trained on the same images."""
        return self.group, self.sources, self.trial

    @property
    def origin(self) -> list[Any]:
        """The run and its step, as tables refer to them."""
        return [self.run.name, self.record["step"]]

    @property
    def has_adapter(self) -> bool:
        """Whether the run saved the factors of an adapter."""
        return (self.saved.folder / ADAPTER).exists()

    def load(self, with_start: bool = False) -> SavedRun:
        """Reloads the run.

        Args:
            with_start: Whether to keep the weights that training started from, for `Algorithm.set_strength`.

        Raises:
            BenchmarkError: Its data or weights are not those of the run.
        """
        return load_run(self.run, self.step, self.moved, with_start)


@dataclass(frozen=True)
class Factors:
    """The adapter of one projection, at the start of training and at the analysed step.

    Attributes:
        module: Name of the linear layer.
        projection: Name of the projection, such as "q".
        first: First output of the layer that belongs to the projection.
        scale: Factor s of the update s·B·A.
        trained: Letters of the factors that train.
        A: Factor A, [r, d_in].
        B: Factor B, [d_out, r].
        start_A: A at the start.
        start_B: B at the start.
        is_residual: Whether s·B·A at the start is a part of the pretrained weight, as with PiSSA.
    """

    module: str
    projection: str
    first: int
    scale: float
    trained: str
    A: Matrix
    B: Matrix
    start_A: Matrix  # noqa: N815
    start_B: Matrix  # noqa: N815
    is_residual: bool

    @property
    def name(self) -> str:
        """Layer and projection."""
        return self.module if self.module.endswith(f".{self.projection}") else f"{self.module}.{self.projection}"

    @property
    def rank(self) -> int:
        """Rank r."""
        return len(self.A)

    @property
    def update_rank(self) -> int:
        """The highest rank that the update can have: r, or 2r if both factors train and the weight is a residual."""
        return 2 * self.rank if self.is_residual and self.trained == "AB" else self.rank

    @property
    def left(self) -> Matrix:
        """The left factor of the update: s·B; [s·B, −s·B₀] if the pretrained weight is a residual."""
        return self.scale * (np.hstack([self.B, -self.start_B]) if self.is_residual else self.B)

    @property
    def right(self) -> Matrix:
        """The right factor of the update: A; A above A₀ if the pretrained weight is a residual."""
        return np.vstack([self.A, self.start_A]) if self.is_residual else self.A

    @property
    def update(self) -> Matrix:
        """What training added to the pretrained weight, [d_out, d_in]."""
        return self.left @ self.right

    def rows(self, weight: Matrix) -> Matrix:
        """The rows of the layer's weight that belong to the projection."""
        return weight[self.first : self.first + len(self.B)]


@dataclass(frozen=True)
class Adapter:
    """The factors of a run.

    Attributes:
        chosen: The run.
        layers: Factors by name, in the model's order.
    """

    chosen: ChosenRun
    layers: dict[str, Factors]

    @cached_property
    def start(self) -> str:
        """A digest of the factors at the start."""
        digest = hashlib.blake2b(digest_size=16)
        for name, layer in self.layers.items():
            digest.update(name.encode() + layer.start_A.tobytes() + layer.start_B.tobytes())
        return digest.hexdigest()


class Sweep:
    """The selected runs of a sweep.

    Args:
        input_dir: Folder of the sweep.
        algorithms: Names of methods in any spelling; None for all.
        step: Which of the saved steps is analysed: "best" (by training-domain validation), "last" or a number.
        moved: Where data, weights and the rest are now.

    Attributes:
        input_dir: Folder of the sweep.
        results: Figures of the runs.
        runs: Selected runs, in the order of tables.

    Raises:
        BenchmarkError: There is no finished run, none can be selected, or a method has no runs.
    """

    def __init__(
        self,
        input_dir: Path,
        algorithms: Sequence[str] | None = None,
        step: str = BEST,
        moved: Moved = Moved(),  # noqa: B008  (it is frozen)
    ) -> None:
        records = [record for record in load_finished(input_dir) if "derived" not in record]
        self.input_dir, self.results = input_dir, Results(records, [TRAINING_DOMAIN])
        wanted = _check_algorithms(algorithms, self.results.algorithms)
        selected = dict.fromkeys(str(record["run"]) for record in self.results.chosen(wanted))
        if not selected:
            raise BenchmarkError(
                f"{input_dir} has no run that is tested on a single environment, as training-domain validation "
                "selects: launch the sweep with --single_test_envs"
            )
        names = [name for name in selected if not any(map(is_diverged, self.results.runs[name]))]
        if not names:
            raise BenchmarkError(
                f"all selected runs in {input_dir} diverged: launch the sweep with other hyperparameters"
            )
        if diverged := len(selected) - len(names):
            warn_once(f"{diverged} of {len(selected)} selected runs diverged: they are not analysed")
        self.runs = [ChosenRun(RunFolder(input_dir / name), step, moved) for name in names]

    def adapted(self) -> list[ChosenRun]:
        """The runs with adapters.

        Raises:
            BenchmarkError: There are none, or runs saved no weights.
        """
        self._check_saved()
        runs = [each for each in self.runs if each.has_adapter]
        if not runs:
            raise BenchmarkError(
                f"{self.input_dir} has no run of a method with factors A and B: launch the sweep with --algorithms BA "
                "BOnly AOnly"
            )
        return runs

    def fully_tuned(self) -> dict[tuple[object, ...], ChosenRun]:
        """The runs of full fine-tuning by their `place`; empty if there are none.

        Of several methods, FullFT comes before ERM, and the first in the order of tables before its variants.
        """
        runs = [each for each in self.runs if family_of(each.algorithm) in _FULL]
        runs.sort(key=lambda each: _FULL.index(family_of(each.algorithm)))  # stable, so tables' order within
        chosen: dict[tuple[object, ...], ChosenRun] = {}
        for each in runs:
            chosen.setdefault(each.place, each)
        return chosen

    def _check_saved(self) -> None:
        errors = []
        for each in self.runs:
            try:
                _ = each.saved
            except BenchmarkError as error:
                errors.append(str(error))
        if errors:
            raise BenchmarkError(
                f"{len(errors)} of {len(self.runs)} selected runs cannot be analysed, e.g. {errors[0]}; or leave their "
                "methods out with --algorithms"
            )


def read_adapters(runs: Sequence[ChosenRun]) -> Iterator[Adapter]:
    """Reads the factors of runs, one after the other, with progress.

    Args:
        runs: Runs with adapters.
    """
    for each in follow(runs, "reading"):
        yield read_adapter(each)


def follow(things: Sequence[T], label: str) -> Iterator[T]:
    """Yields things with a bar that shows how many are done, and the time left.

    Args:
        things: Things, such as runs.
        label: Text before the bar.
    """
    with bar(label, len(things), "runs") as progress:
        for each in things:
            yield each
            progress.advance(1)


def read_adapter(chosen: ChosenRun) -> Adapter:
    """Reads the factors of a run. Those at the start are drawn again from its seed.

    Args:
        chosen: Run with adapters.

    Raises:
        BenchmarkError: Its data or weights are not those of the run.
    """
    saved = chosen.load()
    _warn_of_other_versions(chosen.record)
    with conversions.already_reported():
        start = _factors_of(saved.setup.make_algorithm())
    layers = {
        name: replace(
            layer,
            start_A=start[name].A if "A" in layer.trained else layer.A,
            start_B=start[name].B if "B" in layer.trained else layer.B,
        )
        for name, layer in _factors_of(saved.algorithm).items()
    }
    return Adapter(chosen, layers)


def to_matrix(tensor: Any) -> Matrix:
    """A tensor as a float64 matrix."""
    return np.asarray(tensor.detach().double().cpu().numpy())


def without_setting(algorithm: str, name: str) -> str:
    """A method's id without one of its settings: `BA@rank=8` of `BA@rank=8,adapter_seed=0`.

    Args:
        algorithm: Id of the method.
        name: Name of the hyperparameter.
    """
    kept = ",".join(f"{key}={value}" for key, value in fixed_hyperparameters(algorithm) if key != name)
    return f"{family_of(algorithm)}@{kept}" if kept else family_of(algorithm)


def group_by(things: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Groups things by a key, in their order.

    Args:
        things: Things.
        key: Function that returns the key of a thing.
    """
    groups: dict[Any, list[T]] = {}
    for each in things:
        groups.setdefault(key(each), []).append(each)
    return groups


def _factors_of(algorithm: "Algorithm") -> dict[str, Factors]:
    """The factors that an algorithm has now, by name, as if they were those at the start too."""
    from vitlorafa import adapter_layers

    found = {}
    for module, layer in adapter_layers(algorithm.backbone):
        trained = "".join(name for name in "AB" if getattr(layer, f"lora_{name}").requires_grad)
        for number, projection in enumerate(layer.projections):
            A, B = to_matrix(layer.lora_A[number]), to_matrix(layer.lora_B[number])
            residual = layer.start_B is not None and bool(layer.start_B[number].any())
            factors = Factors(
                module, projection, layer.starts[number], float(layer.scale), trained, A, B, A, B, residual
            )
            found[factors.name] = factors
    return found


def _warn_of_other_versions(record: Record) -> None:
    """Warns if the start of a run may be drawn differently here."""
    from domainbed_ext.runs.provenance import versions

    then, now = record.get("versions", {}), versions()
    other = [f"{name} {then[name]}" for name in _DRAWN_BY if name in then and then[name] != now.get(name)]
    if other:
        warn_once(
            f"runs were trained with {' and '.join(other)}, which may draw another start of A and B than here: results "
            "that compare with the start may be wrong"
        )


def _check_algorithms(names: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    wanted = set()
    for name in there if names is None else names:
        found = find_among(name, there)
        if found is None:
            raise unknown("algorithm of --algorithms", name, there)
        wanted.add(found)
    return [algorithm for algorithm in there if algorithm in wanted]
