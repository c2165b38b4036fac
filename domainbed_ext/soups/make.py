"""Makes a soup: averages the weights, evaluates them, and writes the derived run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from domainbed_ext.data.splits import Split, environment_of
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import better, mean, validation_accuracy
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.saved import load_run, set_up_again
from domainbed_ext.runs.setup import Setup
from domainbed_ext.soups.images import HELD_OUT_LEAST, SoupImages, is_split_by_concepts
from domainbed_ext.soups.plans import Plan
from domainbed_ext.soups.weights import make_mean


@dataclass(frozen=True)
class _Member:
    """A run that a soup may be made of.

    Attributes:
        run: Name of its folder.
        folder: Folder of its saved weights.
        val_acc: Validation accuracy that its record has.
    """

    run: str
    folder: Path
    val_acc: float


def find_images(plan: Plan) -> SoupImages:
    """Finds the images that a soup is evaluated on.

    Args:
        plan: Soup.
    """
    return SoupImages.of(plan.members, plan.test_envs, _find_concepts(plan))


def _find_concepts(plan: Plan) -> list[Sequence[str]]:
    """The concept of each image, by environment; of none if no run was split by concepts, for they take the data."""
    if not any(map(is_split_by_concepts, plan.members)):
        return []
    return [environment.concepts for environment in set_up_again(plan.members[0], plan.moved).dataset.datasets]


def why_not_greedy(plan: Plan) -> str:
    """Says why a soup cannot be greedy; empty if it can.

    Args:
        plan: Greedy soup.
    """
    if find_images(plan).has_held_out:
        return ""
    return (
        f"greedy selection needs {HELD_OUT_LEAST} images of each training domain that no run was trained on, which "
        f"{len(plan.members)} trials do not leave"
    )


def make(plan: Plan) -> dict[str, Any]:
    """Makes a soup.

    Args:
        plan: Soup.

    Returns:
        Its record.

    Raises:
        BenchmarkError: The runs have no mean.
    """
    plan.check()
    images = find_images(plan)
    if plan.kind == "greedy" and not images.has_held_out:
        raise BenchmarkError(f"{plan}: {why_not_greedy(plan)}")
    run = load_run(plan.run_folder(plan.members[0]), moved=plan.moved)
    folders = [saved.folder for saved in plan.saved]
    soup_mean = make_mean(run, folders, plan.merged)
    setup = _setup(run.setup, plan, images)
    soup = replace(run, algorithm=soup_mean.algorithm, setup=setup, feed=Feed(setup, soup_mean.algorithm))
    members = [
        _Member(str(saved.record["run"]), saved.folder, validation_accuracy(saved.record)) for saved in plan.saved
    ]

    def validate(chosen: Sequence[_Member]) -> float:
        soup_mean.load([member.folder for member in chosen])
        return mean(list(soup.accuracies(images.validation).values()))

    chosen = _choose(members, validate) if plan.kind == "greedy" else members
    soup_mean.load([member.folder for member in chosen])
    accuracies = images.accuracies(soup.accuracies(images.measured))
    diverged = {"diverged": True, "first_nonfinite_step": run.record["step"]} if _has_nan(accuracies) else {}
    return plan.derived.finish(
        accuracies,
        {member.run: 1 / len(chosen) for member in chosen},
        facts={"split_sizes": images.sizes, **diverged},
        save=soup_mean.save,
        unmeasured=images.why_unmeasured(plan.environments),
        saved_as=soup_mean.saved_as,
    )


def _choose(members: Sequence[_Member], validate: Callable[[Sequence[_Member]], float]) -> list[_Member]:
    """Adds the runs in the order of their validation accuracy, and keeps each that does not lower that of the soup.

    That is the greedy soup of Wortsman et al. (2022).
    """
    in_order = sorted(members, key=lambda member: member.val_acc if math.isfinite(member.val_acc) else -1, reverse=True)
    chosen = in_order[:1]
    best = validate(chosen)
    for member in in_order[1:]:
        val_acc = validate([*chosen, member])
        if val_acc == best or better(val_acc, best):
            chosen, best = [*chosen, member], val_acc
    return chosen


def _setup(setup: Setup, plan: Plan, images: SoupImages) -> Setup:
    """The setup of the soup, whose splits are the cells of its images."""
    environments = setup.dataset.datasets
    splits = {name: Split(environments[environment_of(name)], cell.keys) for name, cell in images.cells.items()}
    args = replace(setup.args, **plan.derived.args)
    return replace(setup, args=args, test_envs=list(plan.test_envs), splits=splits)


def _has_nan(accuracies: dict[str, float]) -> bool:
    return any(math.isnan(value) for value in accuracies.values())


def count_images(plan: Plan) -> int:
    """Counts the images that are evaluated to make a soup, those of greedy selection as often as they are.

    Args:
        plan: Soup.
    """
    images = find_images(plan)
    count = sum(len(images.cells[name].keys) for name in images.measured)
    tried = len(plan.members) if plan.kind == "greedy" else 0
    return count + tried * sum(images.held_out.values())
