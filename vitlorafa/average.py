"""Saving the mean of saved adapters, see `vitlorafa.mean_update`."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vitlorafa import adapter_folder, origin
from vitlorafa.config import AdapterConfig, parse_number, parse_whole_number
from vitlorafa.errors import AdapterError, warn
from vitlorafa.mean_update import mean_of, mean_update
from vitlorafa.metadata import to_json_entries
from vitlorafa.saved import SavedAdapter, check_alike, factor_tensors, read_all


@dataclass(frozen=True)
class Average(os.PathLike[str]):
    """A mean of adapters that `average` saved; it can be used like the path of its folder.

    Attributes:
        folder: Folder that `load_adapter` reads.
        weights: Weight of each adapter; their sum is 1.
        rank: Rank of the result.
        residual: Relative residual ‖mean update − update‖ / ‖mean update‖ over all layers in the Frobenius norm; 0 if
            the result is exact.
        residuals: The same for each layer.
    """

    folder: Path
    weights: tuple[float, ...]
    rank: int
    residual: float
    residuals: dict[str, float] = field(repr=False)

    def __fspath__(self) -> str:
        """The path of the folder."""
        return os.fspath(self.folder)


def average(
    folders: Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    head: bool = True,
    model: nn.Module | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Average:
    """Saves the weighted mean of adapters as an adapter: its update is the mean of their updates.

    The mean is exact where all adapters have the same A, or the same B: train them with one seed and one frozen factor
    (`AdapterConfig(train="B", seed=0)`). For others, `rank` gives the best approximation at that rank. Heads, other
    trained parameters and buffers, such as the statistics of a BatchNorm, are averaged too; counters are rounded.

    Args:
        folders: Folders of at least two adapters of the same pretrained model, targets and classes, in the format of
            `save_adapter` or of PEFT.
        folder: Folder to write to, in the format of `save_adapter`; it is created if missing.
        weights: Weight of each adapter, 0 or more; they are divided by their sum. If None, all count the same.
        rank: Rank of the result, at which the update is the best approximation of the mean update, by singular values;
            adapters may then differ in factors, rank and scale. If None, the adapters' own, at which it is exact.
        head: Whether to average the heads, if the adapters have any; if False, the result has none.
        model: Model that the adapters belong to; only folders that PEFT wrote need it. It is not changed.
        metadata: Additional values, saved under "metadata" with those that all adapters have in common, and with
            "average": folders, weights, rank and residuals.

    Returns:
        The folder with the weights, the rank and the relative residual.

    Raises:
        AdapterError: If there are fewer than two adapters, if a folder is missing or damaged, if adapters belong to
            different models, targets or classes, if they differ in A and B, rank or scale and `rank` is None, or if a
            weight is negative or not finite. Nothing is written then.

    Warns:
        AdapterWarning: If the adapters were trained with different inputs, such as image sizes.
    """
    target = Path(folder).expanduser()
    adapters = _read(folders, target, model)
    shares = _shares(weights, len(adapters))
    rank = None if rank is None else parse_whole_number("rank", rank, at_least=1)
    entries = _entries(metadata)
    check_alike(adapters, head)
    mean = mean_update(adapters, shares, rank)
    others = {name: mean_of([each.others[name] for each in adapters], shares) for name in adapters[0].others_of(head)}
    result = Average(target, shares, mean.config.rank, mean.residual, mean.residuals)
    description = _describe(adapters, mean.config, head) | {
        "metadata": _common_metadata(adapters) | entries | {"average": _report(adapters, result)}
    }
    adapter_folder.write(target, adapter_folder.encode(description, factor_tensors(mean.layers) | others))
    return result


def _read(folders: Iterable[str | os.PathLike[str]], target: Path, model: nn.Module | None) -> list[SavedAdapter]:
    adapters = read_all(folders, model)
    if len(adapters) < 2:
        raise AdapterError(f"an average needs at least two adapters, not {len(adapters)}")
    if target.resolve() in [each.folder.resolve() for each in adapters]:
        raise AdapterError(f"{target} is one of the averaged adapters: choose another folder for the result")
    return adapters


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weights, divided by their sum."""
    if weights is not None and not isinstance(weights, Iterable):
        raise AdapterError(f"weights must be a list of numbers, not {weights!r}")
    numbers = [1.0] * count if weights is None else [parse_number("a weight", each) for each in weights]
    if len(numbers) != count:
        raise AdapterError(f"weights has {len(numbers)} values for {count} adapters: pass one for each")
    if wrong := [each for each in numbers if not (math.isfinite(each) and each >= 0)]:
        raise AdapterError(f"weights must be finite and 0 or more, not {wrong[0]:g}")
    total = math.fsum(numbers)
    if not (math.isfinite(total) and total > 0):
        raise AdapterError(f"the sum of weights must be finite and above 0, not {total:g}")
    return tuple(each / total for each in numbers)


def _entries(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    entries = to_json_entries(metadata)
    if "average" in entries:
        raise AdapterError("metadata has 'average', under which weights and residuals are saved: rename it")
    return entries


def _describe(adapters: Sequence[SavedAdapter], config: AdapterConfig, head: bool) -> dict[str, Any]:
    """The description of the mean: the first adapter's, with all digests of the same weights."""
    first, *rest = adapters
    for other in rest:
        if differing := origin.differing_input(first.description, other.description):
            warn(
                f"{other.folder} was trained with another input than {first.folder} ({', '.join(differing)} differ): "
                "the average names that of the first"
            )
            break
    description = {name: value for name, value in first.description.items() if not name.endswith("sha256")}
    description |= {"format": adapter_folder.FORMAT, "config": config.to_dict()}
    description["head"] = first.description["head"] if head else []
    descriptions = [each.description for each in adapters]
    if any("digests" in each for each in descriptions):
        description["digests"] = dict(item for each in descriptions for item in (each.get("digests") or {}).items())
    names = [each["class_names"] for each in descriptions if each.get("class_names")]
    description["class_names"] = names[0] if names and all(each == names[0] for each in names) else None
    return description


def _common_metadata(adapters: Sequence[SavedAdapter]) -> dict[str, Any]:
    """The entries that all adapters have in common."""
    first, *rest = (each.description.get("metadata") or {} for each in adapters)
    return {name: value for name, value in first.items() if all(each.get(name, ...) == value for each in rest)}


def _report(adapters: Sequence[SavedAdapter], result: Average) -> dict[str, Any]:
    return {
        "folders": [str(each.folder) for each in adapters],
        "weights": list(result.weights),
        "rank": result.rank,
        "residual": result.residual,
        "residuals": result.residuals,
    }
