"""The bounds on the generalisation gap of lemma 4.5 of the asymmetry paper, for the runs that there are.

Zhu et al., Asymmetry in Low-Rank Adapters of Foundation Models (2024), definition 4.4 and lemma 4.5 (B.4 and B.5 in
its anonymous review version). Let layers i with weights of d_out(i) × d_in(i) be adapted at rank r, each trained
parameter be quantised to q bits, n training examples be drawn independently, and the loss be σ-sub-Gaussian under
the product of its arguments' distributions. Then the expected difference of population and training risk is, in
absolute value, at most

    √(2 r q σ² ln 2 / n · Σ (d_in + d_out))   where both factors train (BA),
    √(2 r q σ² ln 2 / n · Σ d_out)            where B alone does,
    √(2 r q σ² ln 2 / n · Σ d_in)             where A alone does.

The proof bounds the information between what is trained and the training set (Xu and Raginsky, 2017) by the number
of trained bits, so the sum stands under the root, and r Σ is nothing but the number of trained parameters.

Here the loss is one minus accuracy: in [0, 1], hence sub-Gaussian with σ = 1/2 (Hoeffding's lemma), and its gap is
train accuracy minus accuracy on new images of the same environments. On other environments the lemma says nothing.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import Record, training_environments
from domainbed_ext.report.tables.table import NOT_RECORDED

SIGMA = 0.5
BITS = 32  # factors and heads are trained in float32, whatever the precision of the products
CAPTION = (
    "Lemma 4.5: the bound of Zhu et al. (2024) on the expected gap in domain, in percentage points, from the trained "
    "adapter parameters at 32 bits each, the number of training images, and 0-1 loss (sub-Gaussian, σ = 1/2). All "
    "trained: the same argument over every trained parameter, head included, which lemma 4.5 leaves out. A bound of "
    "100 or more says nothing, as no gap is larger: only the order of the bounds can be compared with that of the gaps."
)

_TRAINED: dict[str, Literal["BA", "B", "A"]] = {"BA": "BA", "BOnly": "B", "AOnly": "A"}


class Bounds(NamedTuple):
    """Bounds on one run's expected gap, in [0, ∞) where accuracies are in [0, 1]; None where not known.

    Attributes:
        lemma: over the trained factors alone, as lemma 4.5 has it.
        trained: over all trained parameters.
    """

    lemma: float | None
    trained: float | None


def bound(parameters: int, samples: int, bits: int = BITS, sigma: float = SIGMA) -> float:
    """√(2 σ² · parameters · bits · ln 2 / samples), by which every bound here is formed.

    Args:
        parameters: number of trained parameters.
        samples: number n of training examples.
        bits: of a parameter, q.
        sigma: of the sub-Gaussian loss.

    Returns:
        The bound.
    """
    return math.sqrt(2 * sigma**2 * parameters * bits * math.log(2) / samples)


def lemma_4_5(
    train: Literal["BA", "B", "A"],
    rank: int,
    shapes: Sequence[tuple[int, int]],
    samples: int,
    bits: int = BITS,
    sigma: float = SIGMA,
) -> float:
    """The bound of lemma 4.5.

    Args:
        train: which factors train.
        rank: r.
        shapes: (d_in, d_out) of each adapted projection.
        samples: number n of training examples.
        bits: of a parameter, q.
        sigma: of the sub-Gaussian loss.

    Returns:
        The bound.
    """
    widths = {"BA": [d_in + d_out for d_in, d_out in shapes], "B": [d for _, d in shapes], "A": [d for d, _ in shapes]}
    return bound(rank * sum(widths[train]), samples, bits, sigma)


def of_record(record: Record) -> Bounds:
    """The bounds for one run.

    Args:
        record: one of its records; without `split_sizes` (upstream's have none) nothing is known.

    Returns:
        The bounds.
    """
    sizes = record.get("split_sizes") or {}
    wanted = [f"env{env}_in" for env in training_environments(record)]
    if not all(sizes.get(name) for name in wanted):
        return Bounds(None, None)
    samples = sum(sizes[name] for name in wanted)
    trainable = record.get("trainable_parameters")
    return Bounds(_lemma(record, samples), bound(trainable, samples) if trainable else None)


def cells(records: Iterable[Record]) -> list[str]:
    """The means over runs of both bounds in percentage points, as cells of a table.

    Args:
        records: the chosen record of each run.

    Returns:
        Two strings, "-" where a bound is not known.
    """
    found = [of_record(record) for record in records]
    texts = []
    for values in ([each.lemma for each in found], [each.trained for each in found]):
        known = [100 * value for value in values if value is not None]
        mean = sum(known) / len(known) if known else math.nan
        complete = bool(known) and len(known) == len(values)
        texts.append((f"{mean:,.0f}" if mean >= 100 else f"{mean:.1f}") if complete else NOT_RECORDED)
    return texts


def _lemma(record: Record, samples: int) -> float | None:
    hparams: Mapping[str, Any] = record.get("hparams") or {}
    train = _TRAINED.get(record["args"]["algorithm"].partition("@")[0])
    if train is None or not {"backbone", "targets", "rank"} <= hparams.keys():
        return None
    shapes = adapted_shapes(hparams["backbone"], hparams["targets"])
    return lemma_4_5(train, hparams["rank"], shapes, samples) if shapes else None


@functools.cache
def adapted_shapes(backbone: str, targets: str) -> tuple[tuple[int, int], ...]:
    """(d_in, d_out) of every projection that an adapter of these targets adapts.

    Args:
        backbone: name of a timm model; it is built without memory or weights.
        targets: as in `AdapterConfig`.

    Returns:
        The shapes, q, k and v of a fused layer apart; none if the backbone is not known here.
    """
    # Imported here, for they take seconds, and most tables are made of numbers alone.
    import timm
    import torch

    from domainbed_ext.models import backbone_names
    from vitlorafa import AdapterConfig, AdapterError, linear_sites

    try:
        wanted = AdapterConfig(targets=targets).targets  # type: ignore[arg-type]
        with torch.device("meta"):
            model = timm.create_model(backbone_names.parse(backbone).timm, pretrained=False)
    # A name of another release or of a plug-in that is not here, or a folder that is elsewhere.
    except (AdapterError, BenchmarkError, RuntimeError, ValueError):
        return ()
    shapes = []
    for site in linear_sites(model):
        layer: Any = getattr(site.owner, site.attribute)
        width = layer.out_features // len(site.targets)
        shapes += [(layer.in_features, width) for target in site.targets if target in wanted]
    return tuple(shapes)
