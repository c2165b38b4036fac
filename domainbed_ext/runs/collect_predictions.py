"""From the logits of a run's splits to the predictions that it keeps."""

from collections.abc import Mapping

import torch
from torch import Tensor

from domainbed_ext.data.splits import environment_of, split_of
from domainbed_ext.model_selection import SPLITS
from domainbed_ext.runs.predictions import Part, Predictions
from domainbed_ext.runs.setup import Setup


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
    split = setup.evaluated(next(iter(logits)))
    names = split.environment.image_names()
    is_uda = (splits == SPLITS.index("uda"))[order]
    return Part(
        tuple(names[key] for key in keys[order].tolist()),
        torch.cat(list(logits.values()))[order].float(),
        split.labels(keys[order].tolist()),
        (splits == SPLITS.index("out"))[order],
        is_uda if is_uda.any() else None,
    )
