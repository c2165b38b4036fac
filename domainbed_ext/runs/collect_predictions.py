"""From the logits of a run's splits to its accuracies and to the predictions that it keeps."""

from collections.abc import Mapping

import torch
from torch import Tensor

from domainbed_ext.data.splits import environment_of, split_of
from domainbed_ext.model_selection import SPLITS
from domainbed_ext.runs.predictions import Part, Predictions, are_right
from domainbed_ext.runs.setup import Setup


def compute_accuracies(setup: Setup, logits: Mapping[str, Tensor]) -> dict[str, float]:
    """Computes the accuracies on some splits.

    Args:
        setup: Parts of the run.
        logits: Logits [n, classes] by name of the split, in the order of its evaluated images.

    Returns:
        Accuracy in [0, 1] by "env0_in_acc" and so on; NaN where logits are not finite.
    """
    return {f"{name}_acc": float(are_right(values, _labels(setup, name)).mean()) for name, values in logits.items()}


def collect_predictions(setup: Setup, step: int, selection: str, logits: Mapping[str, Tensor]) -> Predictions:
    """Collects what a run predicted on its splits, as it is kept.

    Args:
        setup: Parts of the run.
        step: Index of the step.
        selection: What the step is: "best" or "last".
        logits: Logits [n, classes] by name of the split, in the order of its evaluated images.
    """
    parts = {
        label: _collect_part(setup, {name: values for name, values in logits.items() if environment_of(name) == env})
        for env, label in enumerate(setup.dataset.environments)
    }
    return Predictions(step, selection, parts, tuple(map(str, setup.dataset.classes)))


def _collect_part(setup: Setup, logits: Mapping[str, Tensor]) -> Part:
    """The predictions of an environment, in the order of its images."""
    keys = torch.cat([torch.as_tensor(setup.evaluated(name).keys) for name in logits])
    splits = torch.cat([torch.full((len(values),), SPLITS.index(split_of(name))) for name, values in logits.items()])
    order = keys.argsort()
    environment = setup.evaluated(next(iter(logits))).environment
    names = environment.image_names()
    is_uda = (splits == SPLITS.index("uda"))[order]
    return Part(
        tuple(names[key] for key in keys[order].tolist()),
        torch.cat(list(logits.values()))[order].float(),
        torch.cat([_labels(setup, name) for name in logits])[order],
        (splits == SPLITS.index("out"))[order],
        is_uda if is_uda.any() else None,
    )


def _labels(setup: Setup, name: str) -> Tensor:
    """The labels of the evaluated images of a split."""
    split = setup.evaluated(name)
    return split.labels(split.keys)
