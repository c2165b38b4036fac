"""This project's targets for speed, by what the processor's bf16 matmuls are worth. Only tables read them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Targets:
    """The targets on processors of one kind.

    Attributes:
        processor: Kind of processor.
        bf16: Least rate of bf16 matmuls over float32 ones on it.
        run: Least speed of a whole run with the defaults over upstream's.
        probe: The same of linear probing.
        step: Most time of a training step of BOnly over PEFT's LoRA-FA.
        dropout: Most time of a training step with adapter dropout over one without.
        evaluation: Least speed of evaluation over timm's own forward pass.
    """

    processor: str
    bf16: float
    run: float
    probe: float
    step: float
    dropout: float
    evaluation: float


KINDS = (
    Targets("AMX", bf16=3.5, run=5, probe=8, step=0.5, dropout=1.15, evaluation=2),
    Targets("AVX-512 bf16", bf16=1.2, run=3, probe=5, step=0.65, dropout=1.15, evaluation=1.5),
    Targets("AVX2", bf16=0, run=1.5, probe=3, step=0.9, dropout=1.3, evaluation=1.1),
)


def choose_targets(rates: Mapping[str, float], device: str = "cpu") -> Targets | None:
    """The targets of this machine, by measured rates rather than by the processor's name.

    Args:
        rates: Rates of large matmuls in "float32" and "bf16".
        device: What computes here: "cpu" or "cuda".

    Returns:
        The targets; None for a GPU, which has none.
    """
    return next(kind for kind in KINDS if _gain(rates) >= kind.bf16) if device == "cpu" else None


def describe_targets(targets: Targets | None, rates: Mapping[str, float]) -> str:
    """Says in a sentence which targets apply, and why.

    Args:
        targets: Targets of this machine.
        rates: Rates of large matmuls in "float32" and "bf16".
    """
    if targets is None:
        return "There are no targets for a GPU."
    gain = f"bf16 matmuls have {_gain(rates):.2g} × the rate of float32 ones here"
    return f"Targets are those of {targets.processor}: {gain}."


def _gain(rates: Mapping[str, float]) -> float:
    return rates["bf16"] / rates["float32"]


def judge(ratio: float, least: float | None = None, most: float | None = None) -> dict[str, str]:
    """The columns "target" and "met" of a table.

    Args:
        ratio: Measured ratio.
        least: Least ratio; None for no such target.
        most: Most ratio; None for no such target.
    """
    if least is not None:
        return {"target": f"≥ {least:g}", "met": "yes" if ratio >= least else "no"}
    if most is not None:
        return {"target": f"≤ {most:g}", "met": "yes" if ratio <= most else "no"}
    return {"target": "", "met": ""}
