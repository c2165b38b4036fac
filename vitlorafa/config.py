"""What an adapter is: rank, scaling, which factor trains, how both start, and what they adapt."""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from vitlorafa.errors import AdapterError, unknown
from vitlorafa.init import INITS

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
TRAIN = ("B", "A", "BA")
COMPUTE = ("folded", "separate")

# Start of (A, B) per trained factor. A frozen factor starts orthonormal: it then only selects a subspace,
# without stretching it, and the trained one starts at zero.
_DEFAULT_INITS = {
    "B": ("orthonormal", "zero"),
    "A": ("zero", "orthonormal"),
    "BA": ("kaiming_uniform", "zero"),
}

_DERIVED: Any = None  # the default of fields that __post_init__ fills in from the others


@dataclass(frozen=True)
class AdapterConfig:
    """One low-rank adapter, W + scale · B A in every adapted layer (LoRA, Hu et al. 2021).

    Which factor trains is the question of "Asymmetry in Low-Rank Adapters of Foundation Models" (Zhu et al.
    2024): with A frozen, B solves a regression on projected features (lemma 4.1); with B frozen, A solves
    one on projected outputs (lemma 4.2). Training B alone is LoRA-FA.

    Fields left at None are filled in on construction, so that a config always reads in full.

    Attributes:
        rank: Rank r of the update.
        alpha: Numerator of the scaling; 2·rank if None.
        train: Factors that train: "B", "A" or "BA".
        init_A: Start of A, a name of `vitlorafa.init.INITS`. If None: orthonormal rows for "B", zero for
            "A", Kaiming uniform for "BA".
        init_B: Start of B. If None: orthonormal columns for "A", else zero.
        targets: Projections to adapt, any of q, k, v, proj, fc1, fc2: a sequence, a comma-separated string,
            or "all". Kept as a tuple in that order.
        rank_stabilised: Scale by alpha/√rank (rsLoRA, Kalajdzievski 2023) instead of alpha/rank.
        dropout: Dropout probability on the adapter's input.
        compute: How a layer computes. "folded": one product with W + s·B·A, formed in float32 once a step and
            rounded once, as full fine-tuning rounds under autocast. "separate": x Wᵀ and the rank-r update
            apart, as with dropout it must.
        gradient_correction: Whether `vitlorafa.correct_gradients` makes the update the closest to full
            fine-tuning's (LoRA-FA, theorem 4.1; LoRA-FB, theorem A.1). Needs a frozen factor.
        seed: Seed of the factors' start; drawn from torch's global generator if None.

    Raises:
        AdapterError: On construction, if a value is out of range, a name is unknown, not exactly one factor
            starts at zero, or a frozen factor does.
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

    def __post_init__(self) -> None:
        def fill(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the one way to set a field of a frozen dataclass

        fill("rank", _whole_number("rank", self.rank, at_least=1))
        if self.train not in TRAIN:
            raise unknown("choice of trained factors", self.train, TRAIN)
        fill("alpha", _number("alpha", 2 * self.rank if self.alpha is None else self.alpha))
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"alpha must be finite and above 0, not {self.alpha}")
        fill("dropout", _number("dropout", self.dropout))
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        for name in ("rank_stabilised", "gradient_correction"):
            if not isinstance(getattr(self, name), bool):
                raise AdapterError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.compute not in COMPUTE:
            raise unknown("way to compute", self.compute, COMPUTE)
        if self.gradient_correction and self.train == "BA":
            raise AdapterError("gradient_correction needs a frozen factor: train 'B' or 'A', or leave it off")
        if self.seed is not None:
            fill("seed", _whole_number("seed", self.seed, at_least=0))
        fill("targets", _targets(self.targets))
        for factor, default in zip("AB", _DEFAULT_INITS[self.train], strict=True):
            if getattr(self, f"init_{factor}") is None:
                fill(f"init_{factor}", default)
            if getattr(self, f"init_{factor}") not in list(INITS):
                raise unknown(f"initialisation of {factor}", getattr(self, f"init_{factor}"), INITS)
        self._check_start()

    def _check_start(self) -> None:
        zero = [factor for factor in "AB" if getattr(self, f"init_{factor}") == "zero"]
        if len(zero) == 2:
            raise AdapterError("A and B both start at zero and would never move: give one another start")
        if not zero:
            raise AdapterError(
                f"A starts {self.init_A} and B starts {self.init_B}: one of them must start at zero, "
                "so that the adapted model starts as the pretrained one"
            )
        if zero[0] not in self.train:
            raise AdapterError(
                f"{zero[0]} starts at zero but is frozen, so nothing could be learned: train it or give it "
                "another start"
            )

    @property
    def scale(self) -> float:
        """The factor s of the update s·B·A: alpha/rank, or alpha/√rank if rank-stabilised."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def generator(self) -> torch.Generator:
        """A new generator on the CPU for the factors' start, seeded by `seed` or from the global one."""
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """The config that `to_dict` wrote.

        Args:
            values: Field names and values; what is missing takes its default.

        Raises:
            AdapterError: On an unknown field or an invalid value.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("field of AdapterConfig", name, names)
        return cls(**values)


def _whole_number(name: str, value: Any, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least or isinstance(value, bool):
        raise AdapterError(f"{name} must be a whole number of at least {at_least}, not {value!r}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise AdapterError(f"{name} must be a number, not {value!r}")
    return float(value)


def _targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(targets, str):
        targets = TARGETS if targets == "all" else [name.strip() for name in targets.split(",")]
    elif not isinstance(targets, Iterable):
        raise AdapterError(f"targets must be names or 'all', not {targets!r}")
    chosen = list(targets)
    for name in chosen:
        if name not in TARGETS:
            raise unknown("target", name, [*TARGETS, "all"])
    if not chosen:
        raise AdapterError(f"targets is empty: choose from {', '.join(TARGETS)}, or 'all'")
    return tuple(name for name in TARGETS if name in chosen)
