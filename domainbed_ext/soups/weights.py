"""Means of saved weights, in weight space.

How the mean is taken follows from what trains:

- adapters with a frozen factor that they share (LoRA-FA, LoRA-FB): the mean of the other factor is the mean of the
  updates, exactly and at the same rank, so the soup is an adapter;
- other adapters (LoRA, PEFT's methods): the mean of the weights that their layers compute with, at full rank. Such a
  soup is evaluated and saved as a fully fine-tuned model;
- everything else (full fine-tuning, partial tuning, linear probe): the mean of the trained tensors.

The heads are averaged too.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from domainbed_ext.algorithms.base import TRAINED, Algorithm, write_trained
from domainbed_ext.algorithms.lora import BA
from domainbed_ext.algorithms.peft import Peft
from domainbed_ext.algorithms.registry import OBJECTIVE
from domainbed_ext.averaging.mean import Mean
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import conversions
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.saved import SavedRun, load_weights
from vitlorafa import AdapterError, adapter_layers, average

MERGED_AS = "FullFT"
"""Method as which a mean of merged weights is evaluated and saved."""

_ADAPTER = "adapter.safetensors"
_SAVED_HEAD = ".modules_to_save.default"  # within names of the heads that PEFT wraps
_TOLERANCE = 1e-3  # of logits in float32, relative to the largest


class WeightMean(ABC):
    """A mean of saved weights, and the algorithm that predicts with it.

    Args:
        run: One of the runs, reloaded.

    Attributes:
        algorithm: Algorithm with the weights that were loaded last.
        saved_as: Method whose `load` reads what `save` wrote; None for the run's own.
    """

    saved_as: str | None = None

    def __init__(self, run: SavedRun) -> None:
        self.algorithm: Algorithm = run.algorithm

    @abstractmethod
    def load(self, folders: Sequence[Path]) -> None:
        """Loads the mean of the weights in some folders.

        Args:
            folders: Folders of saved weights, at least one.

        Raises:
            BenchmarkError: They have no mean.
        """

    def save(self, folder: Path) -> None:
        """Saves the weights that were loaded last.

        Args:
            folder: Folder to write into.
        """
        self.algorithm.save(folder)


class TensorMean(WeightMean):
    """The mean of trained tensors."""

    def load(self, folders: Sequence[Path]) -> None:
        """Loads the mean."""
        with TemporaryDirectory() as folder:
            _write_mean([each / TRAINED for each in folders], Path(folder), self.algorithm)
            load_weights(self.algorithm, Path(folder))


class AdapterMean(WeightMean):
    """The mean of adapters that share a frozen factor, as an adapter.

    Args:
        run: One of the runs, reloaded.
        folders: Folders of all adapters.

    Raises:
        BenchmarkError: They do not share the factor.
    """

    def __init__(self, run: SavedRun, folders: Sequence[Path]) -> None:
        super().__init__(run)
        frozen = "A" if _trains(run.algorithm) == "B" else "B"
        if not _is_shared([folder / _ADAPTER for folder in folders], f"lora_{frozen}"):
            raise BenchmarkError(
                f"the runs of {run.record['args']['algorithm']} were each trained with another frozen {frozen}, so the "
                f"mean of their updates has no such {frozen}: train them with one, as by --hparams "
                "'{\"adapter_seed\": 0}', or add --merged"
            )
        self._kept = TemporaryDirectory()
        self._current = folders[0]

    def load(self, folders: Sequence[Path]) -> None:
        """Loads the mean; of one adapter, itself."""
        self._current = folders[0] if len(folders) == 1 else self._average(folders)
        load_weights(self.algorithm, self._current)

    def _average(self, folders: Sequence[Path]) -> Path:
        target = Path(self._kept.name) / "mean"
        if target.exists():
            shutil.rmtree(target)
        try:
            average(folders, target)
        except AdapterError as error:
            raise BenchmarkError(str(error)) from error
        if (folders[0] / TRAINED).exists():
            _write_mean([each / TRAINED for each in folders], target, self.algorithm)
        return target

    def save(self, folder: Path) -> None:
        """Saves the adapter."""
        shutil.copytree(self._current, folder)


class MergedMean(WeightMean):
    """The mean of the weights that layers compute with, in a model without adapters.

    Args:
        run: One of the runs, reloaded.

    Raises:
        BenchmarkError: The runs have a quantised base.
    """

    saved_as = MERGED_AS

    def __init__(self, run: SavedRun) -> None:
        self._name = run.record["args"]["algorithm"]
        if run.setup.hparams.get("quantise") is not None:
            raise BenchmarkError(f"{self._name} has a quantised base, which merged weights do not fit: leave it out")
        # In float32 nothing of the frozen weights is rounded away before the mean.
        exact = replace(run.setup, hparams={**run.setup.hparams, "precision": "float32"})
        hparams = {name: value for name, value in run.setup.hparams.items() if name != OBJECTIVE}
        setup = replace(run.setup, args=replace(run.setup.args, algorithm=MERGED_AS), hparams=hparams)
        with conversions.already_reported():
            self._ingredient, self.algorithm = exact.make_algorithm(), setup.make_algorithm()
        self._start = {name: tensor.clone() for name, tensor in self.algorithm.backbone.state_dict().items()}
        self._feeds = Feed(exact, self._ingredient), Feed(setup, self.algorithm)

    def load(self, folders: Sequence[Path]) -> None:
        """Loads the mean."""
        self._put(_mean_of(self._effective_weights(folder) for folder in folders))

    def _effective_weights(self, folder: Path) -> dict[str, Tensor]:
        """The weights, in a model without adapters, that predict what the saved ones predict."""
        algorithm = self._ingredient
        load_weights(algorithm, folder)
        weights = {name: tensor.detach() for name, tensor in algorithm.weights().items()}
        if isinstance(algorithm, BA):  # these are updates
            updates = [f"{name}.weight" for name, _ in adapter_layers(algorithm.backbone)]
            weights |= {name: self._start[name] + weights[name] for name in updates}
        trained = {name.replace(_SAVED_HEAD, ""): tensor.detach() for name, tensor in algorithm.trained().items()}
        others = {name: tensor for name, tensor in trained.items() if name in self._start}
        effective = {**self._start, **others, **weights}
        if effective.keys() == self._start.keys():
            self._put(effective)
            if self._predicts_the_same():
                return effective
        raise BenchmarkError(
            f"{self._name} has no weights without its adapters that predict the same, so it has no mean: leave it out "
            "with --algorithms"
        )

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        self.algorithm.backbone.load_state_dict(dict(weights))

    def _predicts_the_same(self) -> bool:
        precision, self.algorithm.precision = self.algorithm.precision, "float32"
        try:
            adapted, merged = (feed.sample_outputs() for feed in self._feeds)
        finally:
            self.algorithm.precision = precision
        if not adapted.isfinite().all():  # a run that diverged
            return True
        largest = float(adapted.abs().max())
        return torch.allclose(adapted, merged, rtol=0.0, atol=_TOLERANCE * max(largest, 1.0))


def make_mean(run: SavedRun, folders: Sequence[Path], merged: bool) -> WeightMean:
    """Makes the mean that suits the runs' method.

    Args:
        run: One of the runs, reloaded.
        folders: Folders of the saved weights of all.
        merged: Whether adapters that share a frozen factor are averaged as merged weights too.

    Raises:
        BenchmarkError: The runs have no mean.
    """
    algorithm = run.algorithm
    if not isinstance(algorithm, BA | Peft):
        return TensorMean(run)
    if merged or isinstance(algorithm, Peft) or _trains(algorithm) == "BA":
        return MergedMean(run)
    return AdapterMean(run, folders)


def _trains(algorithm: Algorithm) -> str:
    return algorithm.TRAIN if isinstance(algorithm, BA) else ""


def _is_shared(files: Sequence[Path], factor: str) -> bool:
    """Whether the factors of a name are the same in all files."""
    first, *others = (dict(_tensors(file, factor)) for file in files)
    return all(
        other.keys() == first.keys() and all(torch.equal(first[name], other[name]) for name in first)
        for other in others
    )


def _tensors(file: Path, ending: str = "") -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                if name.endswith(ending):
                    yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise BenchmarkError(f"cannot read what a run saved in {file} ({error}): run it again") from error


def _write_mean(files: Sequence[Path], folder: Path, algorithm: Algorithm) -> None:
    """Writes the mean of files of trained tensors in the form of one."""
    write_trained(folder, _mean_of(dict(_tensors(file)) for file in files), algorithm.backbone)


def _mean_of(weights: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean, summed in float64; what is no fraction, such as a counter, is the first one's."""
    first: dict[str, Tensor] = {}
    mean = Mean()
    for each in weights:
        first = first or dict(each)
        if each.keys() != first.keys():
            name = min(each.keys() ^ first.keys())
            raise BenchmarkError(f"the runs saved different tensors ({name} is not in all): leave out those that do")
        for name, tensor in each.items():
            if tensor.shape != first[name].shape:
                raise BenchmarkError(f"the runs saved {name} in different shapes: leave out those that do")
        mean.add({name: tensor for name, tensor in each.items() if tensor.is_floating_point()})
    return first | {name: tensor.to(first[name].dtype) for name, tensor in mean.value().items()}
