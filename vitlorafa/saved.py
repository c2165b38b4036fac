"""Saved adapters as values, without a model to load them onto, and whether several belong together."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitlorafa import adapter_folder, origin
from vitlorafa.adapted import timm_model
from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, abbreviate, join_words

_NAMES = ("lora_A", "lora_B", "start_A", "start_B")  # of factors, in the order of `Factors`


class Factors(NamedTuple):
    """The factors of a layer with k adapted projections.

    Attributes:
        A: Factors A, [k, r, d_in].
        B: Factors B, [k, m, r].
        start_A: Factors A at the start, or None if the update started at zero.
        start_B: Factors B at the start, or None.
    """

    A: Tensor
    B: Tensor
    start_A: Tensor | None  # noqa: N815
    start_B: Tensor | None  # noqa: N815


@dataclass(frozen=True)
class SavedAdapter:
    """What the folder of an adapter holds.

    Attributes:
        folder: Folder.
        description: Content of `adapter.json`.
        config: Configuration of the adapter.
        layers: Factors by layer.
        others: Other tensors by name: head, trained parameters, and buffers.
    """

    folder: Path
    description: dict[str, Any]
    config: AdapterConfig
    layers: dict[str, Factors]
    others: dict[str, Tensor]

    @classmethod
    def read(cls, folder: str | os.PathLike[str], model: nn.Module | None = None) -> "SavedAdapter":
        """Reads a folder of `save_adapter` or of PEFT.

        Args:
            folder: Folder to read.
            model: Model that the adapter belongs to; only folders that PEFT wrote need it.

        Raises:
            AdapterError: If files are missing or damaged, or values are not finite.
        """
        folder = Path(folder).expanduser()
        description, tensors = adapter_folder.read(folder, None if model is None else timm_model(model))
        try:
            config = AdapterConfig.from_dict(description["config"])
        except AdapterError as error:
            raise AdapterError(f"the config of {folder} is invalid: {error}") from None
        layers = {
            name: _take_factors(folder, name, len(projections), config.rank, tensors)
            for name, projections in description["layers"].items()
        }
        saved = cls(folder, description, config, layers, tensors)
        saved._check()
        return saved

    @property
    def head(self) -> dict[str, Tensor]:
        """The tensors of the head."""
        return {name: self.others[name] for name in self.description["head"] if name in self.others}

    def others_of(self, head: bool) -> dict[str, Tensor]:
        """The tensors besides the factors, with or without those of the head.

        Args:
            head: Whether to include the head.
        """
        return {name: each for name, each in self.others.items() if head or name not in self.description["head"]}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names of the adapted model's parameters and buffers."""
        return factor_tensors(self.layers) | self.others

    def _check(self) -> None:
        if lost := [name for name in self.description["head"] if name not in self.others]:
            raise AdapterError(f"{self.folder} lacks {abbreviate(lost)} of its head: save it again")
        odd = [name for name, tensor in self.tensors().items() if not tensor.isfinite().all()]
        if odd:
            raise AdapterError(f"{self.folder} has values that are not finite in {abbreviate(odd)}: leave it out")


def read_all(folders: Iterable[str | os.PathLike[str]], model: nn.Module | None = None) -> list[SavedAdapter]:
    """Reads several folders of adapters.

    Args:
        folders: Folders to read.
        model: Model that the adapters belong to; only folders that PEFT wrote need it.

    Raises:
        AdapterError: If these are not folders, or if one cannot be read.
    """
    if isinstance(folders, (str, os.PathLike)) or not isinstance(folders, Iterable):
        raise AdapterError(f"folders must be a list of folders, not {folders!r}")
    paths = list(folders)
    if wrong := [each for each in paths if not isinstance(each, (str, os.PathLike))]:
        raise AdapterError(f"folders must be paths of saved adapters, not {type(wrong[0]).__name__}")
    return [SavedAdapter.read(path, model) for path in paths]


def factor_tensors(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors by the names of the adapted model's parameters and buffers.

    Args:
        layers: Factors by layer.
    """
    named = {
        f"{layer}.{name}": factor
        for layer, factors in layers.items()
        for name, factor in zip(_NAMES, factors, strict=True)
    }
    return {name: factor for name, factor in named.items() if factor is not None}


def _take_factors(folder: Path, layer: str, k: int, rank: int, tensors: dict[str, Tensor]) -> Factors:
    """Removes the factors of a layer with k adapted projections from the tensors."""
    A, B, start_A, start_B = (tensors.pop(f"{layer}.{name}", None) for name in _NAMES)
    starts_at_zero = start_A is None and start_B is None
    if A is None or B is None or not (_fit(A, B, k, rank) and (starts_at_zero or _fit(start_A, start_B, k, rank))):
        raise AdapterError(
            f"{folder} has no factors A [{k}, {rank}, d_in] and B [{k}, m, {rank}] for {layer}: save it again"
        )
    return Factors(A, B, start_A, start_B)


def _fit(A: Tensor | None, B: Tensor | None, k: int, rank: int) -> bool:
    if A is None or B is None or A.dim() != 3 or B.dim() != 3:
        return False
    return (*A.shape[:2], B.shape[0], B.shape[2]) == (k, rank, k, rank)


def check_alike(adapters: Sequence[SavedAdapter], head: bool) -> None:
    """Checks that adapters belong to one model, adapt the same projections, and have the same other tensors.

    Args:
        adapters: Adapters, at least one.
        head: Whether heads and classes have to be alike too.

    Raises:
        AdapterError: If one differs from the first.
    """
    first, *rest = adapters
    for other in rest:
        _check_model(first, other)
        _check_layers(first, other)
        if head:
            _check_classes(first, other)
        _check_others(first, other, head)


def check_same_size(adapters: Sequence[SavedAdapter], remedy: str) -> None:
    """Checks that adapters have the same rank and scale.

    Args:
        adapters: Adapters, at least one.
        remedy: What to do otherwise, for the message.

    Raises:
        AdapterError: If one differs from the first.
    """
    first, *rest = adapters
    for other in rest:
        for name in ("rank", "scale"):
            value, value_there = (getattr(each.config, name) for each in (first, other))
            if value != value_there:
                raise AdapterError(
                    f"{other.folder} has {name} {value_there:g}, but {first.folder} has {value:g}: {remedy}"
                )


def are_same(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors are equal and of one number format, or all None.

    Args:
        tensors: Tensors, at least one.
    """
    first, *rest = tensors
    if first is None:
        return all(each is None for each in rest)
    return all(each is not None and each.dtype == first.dtype and torch.equal(each, first) for each in rest)


def _check_model(first: SavedAdapter, other: SavedAdapter) -> None:
    difference = origin.differing_model(first.description, other.description)
    if difference:
        names = [origin.model_name(each.description) or "unnamed" for each in (first, other)]
        what = "other weights" if difference == "weights" else "another model"
        raise AdapterError(
            f"{other.folder} was trained on {what} ({names[1]}) than {first.folder} ({names[0]}): "
            "choose adapters of one pretrained model"
        )


def _check_layers(first: SavedAdapter, other: SavedAdapter) -> None:
    layers, others = first.description["layers"], other.description["layers"]
    for name in {**layers, **others}:
        here, there = (join_words(each.get(name) or ["nothing"]) for each in (layers, others))
        if here != there:
            raise AdapterError(
                f"{other.folder} adapts {there} in {name}, but {first.folder} adapts {here}: choose adapters with the "
                "same targets and blocks"
            )
        widths, widths_there = ((each.layers[name].A.shape[2], each.layers[name].B.shape[1]) for each in (first, other))
        if widths != widths_there:
            raise AdapterError(
                f"{name} maps {widths_there[0]} to {widths_there[1]} values in {other.folder}, but {widths[0]} to "
                f"{widths[1]} in {first.folder}: choose adapters of one pretrained model"
            )


def _check_classes(first: SavedAdapter, other: SavedAdapter) -> None:
    remedy = "choose adapters of one set of classes, or head=False"
    for name in first.head.keys() & other.head.keys():
        shape, shape_there = first.head[name].shape, other.head[name].shape
        if shape != shape_there and shape[1:] == shape_there[1:]:
            raise AdapterError(
                f"the head of {other.folder} has {shape_there[0]} classes, but that of {first.folder} has {shape[0]}: "
                f"{remedy}"
            )
    names, names_there = (each.description.get("class_names") for each in (first, other))
    if first.head and names and names_there and names != names_there:
        raise AdapterError(
            f"the classes of {other.folder} are {abbreviate(names_there)}, but those of {first.folder} are "
            f"{abbreviate(names)}: {remedy}"
        )


def _check_others(first: SavedAdapter, other: SavedAdapter, head: bool) -> None:
    tensors, others = (each.others_of(head) for each in (first, other))
    for name in {**tensors, **others}:
        lacking = other if name not in others else first if name not in tensors else None
        if lacking:
            has = first if lacking is other else other
            is_head = name in has.description["head"]
            remedy = "save all with head=True, or choose head=False" if is_head else "choose adapters of one training"
            raise AdapterError(f"{lacking.folder} lacks {name}, which {has.folder} has: {remedy}")
        if tensors[name].shape != others[name].shape:
            raise AdapterError(
                f"{name} is {list(others[name].shape)} in {other.folder} and {list(tensors[name].shape)} in "
                f"{first.folder}: choose adapters of one pretrained model"
            )
