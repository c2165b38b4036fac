"""The configuration of an adapter: rank, scaling, trained factors, initialisation and adapted projections."""

import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from vitlorafa.errors import AdapterError, unknown
from vitlorafa.init import INITS, RESIDUAL
from vitlorafa.target_names import TARGETS as TARGETS
from vitlorafa.target_names import is_pattern, parse_sites, parse_targets

TRAIN = ("B", "A", "BA")
COMPUTE = ("folded", "separate")

# PEFT's name of a field -> the field.
PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rank_stabilised",
    "layers_to_transform": "blocks",
}
# Names of the methods, in lower case without separators -> factors that train.
_METHODS = {
    "lorafa": "B",
    "lorafb": "A",
    "lora": "BA",
    "bonly": "B",
    "aonly": "A",
    "ab": "BA",
}

# Initialisation of (A, B) by trained factors. A frozen factor starts orthonormal: it selects a subspace without
# stretching it. The trained factor starts at zero.
_DEFAULT_INITS = {
    "B": ("orthonormal", "zero"),
    "A": ("zero", "orthonormal"),
    "BA": ("kaiming_uniform", "zero"),
}

_ALL = "all"  # key of the initialisation of projections without a name of their own
_DERIVED: Any = None  # the default of fields that __post_init__ derives from the others


def _accept_peft_names(cls: Any) -> Any:
    """Class decorator that lets the constructor take PEFT's names of the fields, too."""
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **values: Any) -> None:  # noqa: N807
        construct(self, *args, **_canonical(values))

    cls.__init__ = __init__
    return cls


@_accept_peft_names
@dataclass(frozen=True)
class AdapterConfig:
    r"""One low-rank adapter: W + scale · B A in every adapted layer (LoRA, Hu et al. 2021).

    Which factor to train is the question of "Asymmetry in Low-Rank Adapters of Foundation Models" (Zhu et al.
    2024): with A frozen, B solves a regression on projected features (lemma 4.1); with B frozen, A solves
    a regression on projected outputs (lemma 4.2). Training both is LoRA, B alone LoRA-FA, A alone LoRA-FB.

    PEFT's names work too: `AdapterConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")`, and
    `use_rslora`. The config has the fields below only: they are what attributes, saved files and type checkers know.
    Defaults are not PEFT's: alpha is 2·rank, and `train` is "B".

    Fields that are None are derived on construction, so that a config is always complete.

    Attributes:
        rank: Rank r of the update.
        alpha: Numerator of the scaling; if None, 2·rank.
        train: Factors that train: "BA" (or "LoRA"), "B" (or "LoRA-FA") or "A" (or "LoRA-FB"). Kept as "BA", "B" or "A".
        init_A: Initialisation of A, a name in `vitlorafa.INITS`. If None: orthonormal rows if B trains alone, zero if
            A trains alone, Kaiming uniform if both train. It may differ between targets, as a mapping
            `{"all": "uniform", "fc2": "gaussian"}` or a string "uniform,fc2=gaussian", of which the last match counts;
            targets without one have the default. Kept as a name, or as "q=uniform,fc2=gaussian".
        init_B: Initialisation of B. If None: orthonormal columns if A trains alone, otherwise zero. "pissa" and
            "milora" initialise both factors: given for one, they hold for the other too. The update is then
            s·(B·A − B₀·A₀) with the factors' start A₀ and B₀: the frozen weight is the residual W − s·B₀·A₀.
        targets: Projections to adapt, any of q, k, v, proj, fc1 and fc2, as a sequence or a comma-separated string.
            "qkv" stands for q, k and v, "all" (or "all-linear") for all six. Kept as a tuple in this order. Or a
            pattern of full layer names, as in PEFT's `target_modules`, such as r"layers\.\d+\.mlp\.fc[12]": these
            linear layers are adapted then, in any model. Kept as a tuple of the pattern.
        rank_stabilised: Whether to scale by alpha/√rank (rsLoRA, Kalajdzievski 2023) instead of alpha/rank.
        dropout: Dropout probability on the adapter's input.
        compute: How a layer computes. "folded": a single matmul with W + s·B·A, which is computed in float32 once per
            step and rounded once, as full fine-tuning rounds under autocast. "separate": x Wᵀ plus the rank-r
            update. With dropout, layers always compute separately.
        gradient_correction: Whether `vitlorafa.correct_gradients` may bring the update as close as possible to that of
            full fine-tuning (LoRA-FA, theorem 4.1; LoRA-FB, theorem A.1; if both factors train, LoRA-Pro).
        seed: Seed of the initialisation; if None, drawn from torch's global generator.
        blocks: Transformer blocks to adapt, counted from 0, or from the end if negative: whole numbers, or a string
            such as "0-5", "0,2,4-6", "first3" or "last4". If None, all. Kept as a tuple of numbers.
        sites: Where the projections are in a model whose structure is not known: a mapping from patterns of full layer
            names to the projections that these layers compute, such as {r"layers\.\d+\.to_qkv": "q,k,v"}. Several are
            equal parts of the layer's outputs, in this order. If None, layers are found by structure. Kept as pairs.

    Raises:
        AdapterError: On construction, if a value is out of range, a name is unknown or given twice, both factors or
            none start at zero, a frozen factor starts at zero, one factor only starts with a residual, or a pattern is
            combined with `blocks` or `sites`.
    """

    rank: int = 8
    alpha: float = _DERIVED
    train: str = "B"
    init_A: str = _DERIVED  # noqa: N815
    init_B: str = _DERIVED  # noqa: N815
    targets: tuple[str, ...] = ("q", "v")
    rank_stabilised: bool = False
    dropout: float = 0.0
    compute: str = "folded"
    gradient_correction: bool = False
    seed: int | None = None
    blocks: tuple[int, ...] | None = None
    sites: tuple[tuple[str, tuple[str, ...]], ...] | None = None

    def __post_init__(self) -> None:
        def fill(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the only way to set a field of a frozen dataclass

        fill("rank", parse_whole_number("rank", self.rank, at_least=1))
        fill("train", _parse_train(self.train))
        fill("alpha", parse_number("alpha", 2 * self.rank if self.alpha is None else self.alpha))
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"alpha must be finite and above 0, not {self.alpha}")
        fill("dropout", parse_number("dropout", self.dropout))
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        for name in ("rank_stabilised", "gradient_correction"):
            if not isinstance(getattr(self, name), bool):
                raise AdapterError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.compute not in COMPUTE:
            raise unknown("way to compute", self.compute, COMPUTE)
        if self.seed is not None:
            fill("seed", parse_whole_number("seed", self.seed, at_least=0))
        fill("targets", parse_targets(self.targets))
        fill("blocks", None if self.blocks is None else _parse_blocks(self.blocks))
        fill("sites", None if self.sites is None else parse_sites(self.sites))
        if self.pattern and self.sites:
            raise AdapterError("targets is a pattern, but sites is given too: with sites, targets are names such as q")
        if self.blocks is not None and (self.pattern or self.sites):
            raise AdapterError("blocks cannot be combined with patterns of names: write the blocks' numbers into these")
        self._fill_inits(fill)

    def _fill_inits(self, fill: Callable[[str, object], None]) -> None:
        given = self._named_inits()
        inits: list[dict[str, str]] = [{}, {}]
        for target in TARGETS if self.pattern else self.targets:
            pair = [each.get(target) for each in given]
            both = next((name for name in pair if name in RESIDUAL), None)
            for place, default in enumerate(_DEFAULT_INITS[self.train]):
                inits[place][target] = pair[place] or both or default
            self._check_start(*(each[target] for each in inits))
        for factor, each in zip("AB", inits, strict=True):
            names = set(each.values())
            text = ",".join(f"{target}={name}" for target, name in each.items())
            fill(f"init_{factor}", names.pop() if len(names) == 1 else text)

    def _check_start(self, init_A: str, init_B: str) -> None:
        if init_A == init_B and init_A in RESIDUAL:
            return
        names = {"A": init_A, "B": init_B}
        zero = [factor for factor, name in names.items() if name == "zero"]
        if len(zero) == 2:
            raise AdapterError("A and B both start at zero, so neither could learn: change init_A or init_B")
        for name in RESIDUAL:
            if name in names.values():
                raise AdapterError(
                    f"init_A is {init_A!r} and init_B is {init_B!r}, but {name!r} initialises both factors: set both "
                    f"to {name!r}, or leave one out"
                )
        if not zero:
            raise AdapterError(
                f"init_A is {init_A!r} and init_B is {init_B!r}, so the adapted model would not start as the "
                "pretrained one: set one of them to 'zero'"
            )
        if zero[0] not in self.train:
            raise AdapterError(
                f"{zero[0]} starts at zero but is frozen, so nothing could be learned: train it, or change "
                f"init_{zero[0]}"
            )

    def inits(self, target: str) -> tuple[str, str]:
        """The initialisations of A and B of one target, names in `vitlorafa.INITS`.

        Args:
            target: Name of an adapted projection.
        """
        init_A, init_B = (
            each.get(target, each.get(_ALL, default))
            for each, default in zip(self._named_inits(), _DEFAULT_INITS[self.train], strict=True)
        )
        return init_A, init_B

    def _named_inits(self) -> list[dict[str, str]]:
        """The initialisations of A and of B that are named, by target."""
        targets = TARGETS if self.pattern else self.targets
        return [_parse_init(factor, getattr(self, f"init_{factor}"), targets) for factor in "AB"]

    @property
    def pattern(self) -> str | None:
        """The pattern of layer names in `targets`; None if these are names of projections."""
        return self.targets[0] if is_pattern(self.targets[0]) else None

    def chosen(self, projections: Iterable[str]) -> tuple[str, ...]:
        """Those of a layer's projections that are adapted; all if the config has a pattern.

        Args:
            projections: Projections that the layer computes.
        """
        return tuple(name for name in projections if self.pattern or name in self.targets)

    @property
    def scale(self) -> float:
        """The factor s of the update s·B·A: alpha/rank, or alpha/√rank if rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def generator(self) -> torch.Generator:
        """A new generator on the CPU for the initialisation, seeded with `seed` or from torch's global generator."""
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)

    def to_dict(self) -> dict[str, Any]:
        """The fields, by their canonical names, as values that JSON can hold."""
        blocks = None if self.blocks is None else list(self.blocks)
        sites = None if self.sites is None else {pattern: list(targets) for pattern, targets in self.sites}
        return asdict(self) | {"targets": list(self.targets), "blocks": blocks, "sites": sites}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """The config that `to_dict` wrote.

        Args:
            values: Values by field name; missing fields take their defaults.

        Raises:
            AdapterError: If a field is unknown or a value is invalid.
        """
        return cls(**values)


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of AdapterConfig's fields; PEFT's names are translated, others refused."""
    names = [field.name for field in fields(AdapterConfig)]
    canonical: dict[str, Any] = {}
    for name, value in values.items():
        field = PEFT_NAMES.get(name, name)
        if field not in names:
            raise unknown("field of AdapterConfig", name, [*names, *PEFT_NAMES])
        if field in canonical:
            both = [other for other in values if PEFT_NAMES.get(other, other) == field]
            raise AdapterError(f"{' and '.join(both)} are the same field of AdapterConfig: give {field} only")
        canonical[field] = value
    return canonical


def _parse_train(train: Any) -> str:
    if isinstance(train, str) and train not in TRAIN:
        train = _METHODS.get(train.lower().replace("-", "").replace("_", "").replace(" ", ""), train)
    if train not in TRAIN:
        raise unknown("choice of trained factors", train, [*TRAIN, "LoRA", "LoRA-FA", "LoRA-FB"])
    return str(train)


def parse_whole_number(name: str, value: Any, at_least: int) -> int:
    """A whole number, which may be of NumPy or torch.

    Args:
        name: Name of the value, for the message.
        value: Value that the user gave.
        at_least: Smallest number that is allowed.

    Raises:
        AdapterError: If it is not a whole number, or is smaller.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least or isinstance(value, bool):
        raise AdapterError(f"{name} must be a whole number of at least {at_least}, not {value!r}")
    return number


def parse_number(name: str, value: Any) -> float:
    """A number, which may be of NumPy or torch.

    Args:
        name: Name of the value, for the message.
        value: Value that the user gave.

    Raises:
        AdapterError: If it is not one number.
    """
    with suppress(TypeError, ValueError, RuntimeError):  # of arrays and tensors of several numbers
        if not isinstance(value, (bool, str)) and hasattr(value, "__float__"):
            return float(value)
    raise AdapterError(f"{name} must be a number, not {value!r}")


def _parse_init(factor: str, init: Any, targets: tuple[str, ...]) -> dict[str, str]:
    """The initialisation of a factor by target, of those targets that it names."""
    if init is None:
        return {}
    if isinstance(init, str):
        parts = [part.rpartition("=") for part in init.split(",")]
        named = [(target.strip() if equals else "all", name.strip()) for target, equals, name in parts]
    elif isinstance(init, Mapping):
        named = list(init.items())
    else:
        raise unknown(f"initialisation of {factor}", init, INITS)
    chosen: dict[str, str] = {}
    for target, name in named:
        if name not in INITS:
            raise unknown(f"initialisation of {factor}", name, INITS)
        if target in TARGETS and target not in targets:
            raise AdapterError(
                f"init_{factor} names {target}, which is not adapted: add it to targets ({', '.join(targets)}), or "
                "leave it out"
            )
        chosen.update(dict.fromkeys(parse_targets(target), name))
        if target in ("all", "all-linear"):
            chosen[_ALL] = name
    return chosen


def _parse_blocks(blocks: Any) -> tuple[int, ...]:
    numbers: list[int] = []
    if isinstance(blocks, str):
        for part in blocks.replace(" ", "").split(","):
            numbers += _block_range(part)
    else:
        for number in blocks if isinstance(blocks, Iterable) else [blocks]:
            try:
                numbers.append(operator.index(number))
            except TypeError:
                raise _no_blocks(number) from None
            if isinstance(number, bool):
                raise _no_blocks(number)
    if not numbers:
        raise AdapterError("blocks is empty: give numbers such as '0-5' or 'last4', or None for all")
    return tuple(dict.fromkeys(numbers))


def _block_range(part: str) -> range:
    if match := re.fullmatch(r"(first|last)(\d{1,4})", part):
        count = int(match[2])
        numbers = range(count) if match[1] == "first" else range(-count, 0)
    elif match := re.fullmatch(r"(-?\d{1,4})(?:-(-?\d{1,4}))?", part):
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
    else:
        raise _no_blocks(part)
    if not numbers:
        raise AdapterError(f"blocks has {part!r}, which names no block: give a range such as '0-5' or 'last4'")
    return numbers


def _no_blocks(value: Any) -> AdapterError:
    return AdapterError(f"blocks must be whole numbers, or a string such as '0-5' or 'last4', not {value!r}")
