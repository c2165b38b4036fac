"""The images on the page that all methods get wrong, or one alone: small pictures where the data set is there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from domainbed_ext.report.predictions.mistakes import MistakeGroup, Mistaken, group_mistakes
from domainbed_ext.report.predictions.tested import Predicted

SHOWN = 24
"""Images of a group that are shown, spread over its environments and classes."""

ROOM = 150
"""Pictures on a page, of about 2 kB each; what is shown beyond them has its name alone."""

Thumbnail = Callable[[dict[str, Any], int, str], str | None]
"""Function of a run's record, an environment's index and an image's name that returns the picture as a data URI; None
where there is none."""


@dataclass(frozen=True)
class Picture:
    """An image as the page shows it.

    Attributes:
        uri: Data URI of the picture; None to show the name alone.
        environment: Label of its environment.
        image: Its name and classes.
    """

    uri: str | None
    environment: str
    image: Mistaken


@dataclass(frozen=True)
class Fold:
    """A group of images.

    Attributes:
        title: Which methods get them wrong.
        count: Number of images of the group.
        pictures: Those that are shown.
    """

    title: str
    count: int
    pictures: list[Picture]


@dataclass(frozen=True)
class Gallery:
    """The groups of a comparison.

    Attributes:
        title: What the methods were run on.
        folds: Groups that have images.
    """

    title: str
    folds: list[Fold]


def make_galleries(gathered: Sequence[Predicted], thumbnail: Thumbnail | None) -> list[Gallery]:
    """Chooses the images that the page shows.

    Args:
        gathered: What the runs predict.
        thumbnail: Function that makes a picture of an image; None to show names alone.

    Returns:
        A gallery for each comparison that has such images.
    """
    room = ROOM
    galleries = []
    for predicted in gathered:
        folds = []
        for group in group_mistakes(predicted):
            fold = _make_fold(predicted, group, thumbnail if room > 0 else None)
            room -= sum(picture.uri is not None for picture in fold.pictures)
            folds.append(fold)
        if folds:
            galleries.append(Gallery(predicted.title, folds))
    return galleries


def _make_fold(predicted: Predicted, group: MistakeGroup, thumbnail: Thumbnail | None) -> Fold:
    """A group with the images that are shown."""
    record = next(iter(predicted.by_algorithm.values()))[0].record
    labels = predicted.comparison.environments
    count = min(SHOWN, len(group.images))
    chosen = [group.images[number * len(group.images) // count] for number in range(count)]
    uris = [thumbnail and thumbnail(record, each.env, each.name) for each in chosen]
    pictures = [Picture(uri, labels[each.env], each) for uri, each in zip(uris, chosen, strict=True)]
    return Fold(group.title, len(group.images), pictures)
