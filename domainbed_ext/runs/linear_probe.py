"""The linear probe on features: a multinomial logistic regression, solved to its optimum.

With each domain of the training features weighing the same, it minimises the mean cross-entropy plus L2/2 · ‖W‖², for
features that are centred and of mean square 1, so that one grid of penalties suits every backbone. The penalty is the
one with the highest validation accuracy, as in Kumar et al. (2022, https://arxiv.org/abs/2202.10054).

A fit takes longer than the training of a short run, and all runs on the same images start at the same probe: it is
cached.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from domainbed_ext.cache.entries import Entries
from domainbed_ext.cache.tensors import Kept, find_or_compute
from domainbed_ext.data.loader import Minibatch
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.provenance import machine, rounding, versions
from domainbed_ext.system import strict_json

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""The values of L2 among which validation chooses."""
_TOLERANCE, _ITERATIONS = 1e-6, 10_000  # of the largest entry of the gradient
_CHOICE = "choice"  # of the penalty, in the cache


@dataclass(frozen=True)
class LinearProbe:
    """A linear layer that classifies features.

    Attributes:
        weight: Weight [classes, width], float32.
        bias: Bias [classes], float32; zeros if it was fitted without one.
        l2: Penalty that validation chose.
        accuracy: Mean of the accuracies on the validation features of each domain, in [0, 1].
    """

    weight: Tensor
    bias: Tensor
    l2: float
    accuracy: float


@dataclass(frozen=True)
class ProbeData:
    """What a linear probe is fitted to.

    Attributes:
        training: Features [n, width] and labels [n] of each domain.
        weights: Weights [n] of each domain's samples, which sum to 1.
        validation: Features and labels of each domain's validation samples.
        num_classes: Number of classes. Those without a training sample are never predicted.
        bias: Whether the layer has a bias.
    """

    training: Sequence[Minibatch]
    weights: Sequence[np.ndarray]
    validation: Sequence[Minibatch]
    num_classes: int
    bias: bool = True


def find_or_fit(
    data: ProbeData, cache: Entries | None, name: str, threads: int = 1, stop: Callable[[], None] = lambda: None
) -> LinearProbe:
    """Takes the probe from the cache, or fits it.

    Args:
        data: What it is fitted to.
        cache: Cache that keeps it; None to keep none.
        name: Name of the data set, the first part of the probe's key in the cache.
        threads: Number of threads.
        stop: Function that is called while another process fits the same probe; may raise.

    Raises:
        BenchmarkError: There is none, see `fit`; or the cached one cannot be read.
    """

    def kept() -> Kept:
        probe = fit(data, threads)
        choice = {_CHOICE: strict_json.dumps({"l2": probe.l2, "accuracy": probe.accuracy})}
        return Kept({"weight": probe.weight, "bias": probe.bias}, choice)

    def read(kept: Kept) -> LinearProbe:
        choice = json.loads(kept.texts[_CHOICE])
        return LinearProbe(kept.tensors["weight"], kept.tensors["bias"], choice["l2"], choice["accuracy"])

    probe = None
    if cache is not None:
        key, size = f"{name}/probe-{_digest(data, threads)}", 4 * data.num_classes * (data.training[0][0].shape[1] + 1)
        probe = find_or_compute(cache, key, size, kept, read, f"linear probe, {name}", stop)
    return probe or fit(data, threads)


def _digest(data: ProbeData, threads: int) -> str:
    """The digest of all that the probe depends on."""
    packages = {name: version(name) for name in ("scikit-learn", "scipy")}
    facts = {**versions(), **packages, **machine(), **rounding(), "threads": threads}
    facts |= {"classes": data.num_classes, "bias": data.bias, "penalties": PENALTIES}
    facts |= {"tolerance": _TOLERANCE, "iterations": _ITERATIONS}
    digest = hashlib.blake2b(strict_json.dumps(facts, sort_keys=True).encode("utf-8"), digest_size=8)
    domains = [*(each for batch in (*data.training, *data.validation) for each in batch), *data.weights]
    for values in map(np.ascontiguousarray, domains):
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def fit(data: ProbeData, threads: int = 1) -> LinearProbe:
    """Fits a linear probe. The same data give the same probe on one machine.

    Args:
        data: What it is fitted to.
        threads: Number of threads.

    Raises:
        BenchmarkError: The training samples are of one class, or features are not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # here, for it takes a second to load

    bias, num_classes = data.bias, data.num_classes
    x = torch.cat([features for features, _ in data.training]).double().numpy()
    y = torch.cat([labels for _, labels in data.training]).numpy()
    share = np.concatenate(data.weights) / len(data.weights)
    classes = np.unique(y)
    if len(classes) < 2:
        raise BenchmarkError("head_start=probe: all training images are of one class: choose another head_start")
    if not np.isfinite(x).all():
        raise BenchmarkError("head_start=probe: the backbone's features are not finite: choose another --precision")
    centre = share @ x if bias else np.zeros(x.shape[1])
    x -= centre
    scale = float(np.sqrt(share @ np.square(x).mean(1))) or 1.0
    x /= scale
    model = LogisticRegression(fit_intercept=bias, tol=_TOLERANCE, max_iter=_ITERATIONS, warm_start=True)
    best: LinearProbe | None = None
    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for l2 in PENALTIES:  # each from the optimum of the one before
            # Of two classes, scikit-learn fits the difference of the rows of W, whose square is twice ‖W‖².
            model.set_params(C=(2 if len(classes) == 2 else 1) / l2).fit(x, y, sample_weight=share)
            if model.n_iter_.max() >= _ITERATIONS:
                print(
                    f"warning: the linear probe did not converge in {_ITERATIONS} steps at L2 {l2:g}", file=sys.stderr
                )
            weight, intercept = _layer(model.coef_ / scale, model.intercept_, centre, classes, num_classes)
            accuracy = _accuracy(weight, intercept, data.validation)
            if best is None or accuracy > best.accuracy:
                best = LinearProbe(weight, intercept, l2, accuracy)
    assert best is not None
    return best


def _layer(
    weight: np.ndarray, bias: np.ndarray, centre: np.ndarray, classes: np.ndarray, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The linear layer of all classes, for features that are not centred."""
    bias = bias - weight @ centre
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    # The logits of an optimum have the mean of all biases for their mean: none is below the lowest at every class.
    rows, biases = np.zeros((num_classes, weight.shape[1])), np.full(num_classes, bias.min())
    rows[classes], biases[classes] = weight, bias
    return torch.from_numpy(rows).float(), torch.from_numpy(biases).float()


def _accuracy(weight: Tensor, bias: Tensor, validation: Sequence[Minibatch]) -> float:
    """The mean of the domains' accuracies, of logits in float32 as the head's."""
    predicted = [(features.float() @ weight.T + bias).argmax(1) for features, _ in validation]
    right = [(each == labels).double().mean() for each, (_, labels) in zip(predicted, validation, strict=True)]
    return float(torch.stack(right).mean())
