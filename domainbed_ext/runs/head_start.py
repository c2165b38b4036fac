"""The head of a run that starts at the linear probe (`head_start=probe`; LP-FT, Kumar et al. 2022).

The probe is fitted to the features that the pretrained backbone computes of the training environments' `in` splits,
without augmentation; their `out` splits choose the penalty. Each environment weighs the same, and within one each
image, or each class if the run is `class_balanced`: as in the run's minibatches. What it starts at is kept in the run's
folder, for predictions at strength 0.
"""

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.probe import LP
from domainbed_ext.algorithms.registry import OBJECTIVE
from domainbed_ext.data.loader import draw_probabilities
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import conversions
from domainbed_ext.models.head import find_linear
from domainbed_ext.models.tensor_files import save_tensors
from domainbed_ext.runs import checkpoint
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import HEAD_START, RunFolder
from domainbed_ext.runs.images import entries
from domainbed_ext.runs.linear_probe import LinearProbe, ProbeData, find_or_fit
from domainbed_ext.system.files import replace_atomically


def start_head(feed: Feed, folder: RunFolder) -> LinearProbe:
    """Fits the probe, puts it into the head, and saves it in the folder of the run.

    Args:
        feed: Feed of the run's algorithm, which has not done a step.
        folder: Folder of the run.

    Returns:
        The probe.

    Raises:
        BenchmarkError: There is none, e.g. of images of one class.
        OSError: It cannot be saved.
    """
    probe = _fit(_feed_of_probe(feed))
    tensors = {"weight": probe.weight, "bias": probe.bias}
    feed.algorithm.start_head(tensors)
    try:
        replace_atomically(folder.path / HEAD_START, lambda path: save_tensors(tensors, path))
    except SafetensorError as error:  # what a full disk ends in
        raise OSError(f"cannot write {folder.path / HEAD_START} ({error})") from error
    return probe


def restore_start(algorithm: Algorithm, folder: RunFolder) -> None:
    """Keeps the weights that a run started from, for strengths: with the probe in the head, if it started there.

    Args:
        algorithm: Algorithm of the run as it is made, before the trained weights are loaded.
        folder: Folder of the run.

    Raises:
        BenchmarkError: The folder lacks the probe.
    """
    if algorithm.starts_at_probe:
        algorithm.start_head(_read_probe(folder.path / HEAD_START))
    algorithm.keep_start()


def _read_probe(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise BenchmarkError(
            f"cannot read the probe that the head started at from {path} ({error}): run it again"
        ) from error


def _feed_of_probe(feed: Feed) -> Feed:
    """The feed of a linear probe of the same run, whose features are those of the pretrained backbone."""
    if isinstance(feed.algorithm, LP):
        return feed
    hparams = {name: value for name, value in feed.setup.hparams.items() if name != OBJECTIVE}
    setup = replace(feed.setup, args=replace(feed.setup.args, algorithm="LP"), hparams=hparams)
    random_states = checkpoint.random_states()
    try:
        with conversions.already_reported():  # by the run itself, of the same backbone
            return Feed(setup, setup.make_algorithm(), feed.stop)
    finally:
        checkpoint.set_random_states(random_states)


def _fit(feed: Feed) -> LinearProbe:
    setup, head = feed.setup, find_linear(feed.algorithm.backbone, feed.setup.hparams)
    names = [f"env{i}_in" for i in setup.train_envs]
    data = ProbeData(
        [feed.split_features(name) for name in names],
        [draw_probabilities(setup.splits[name], setup.hparams["class_balanced"]) for name in names],
        [feed.split_features(name) for name in setup.validation_splits],
        setup.dataset.num_classes,
        bias=head.bias is not None,
    )
    return find_or_fit(data, entries(setup.args), setup.args.dataset, setup.args.threads, feed.stop)
