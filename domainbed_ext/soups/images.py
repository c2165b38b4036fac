"""The images that a soup's accuracies are of.

Trials have splits of their own, so what one ingredient was trained on may be held out of another. Honest numbers take:

- of a training environment, as `out` only the images that no ingredient was trained on, and as `in` only those that all
  of them were trained on;
- of a test environment, which none was trained on, the splits of every ingredient alike: an accuracy is the mean over
  the ingredients' splits, so that its difference to the mean of the ingredients' accuracies is one of the same images.

Where all ingredients have the same splits, as within a trial, these are the splits themselves. Every image is evaluated
once: images that are in the same splits of as many ingredients are a cell.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domainbed_ext.data.splits import environment_of, held_out_concepts, split_environment
from domainbed_ext.model_selection import SPLITS, Split, num_environments
from domainbed_ext.protocols import CONCEPTS

HELD_OUT_LEAST = 50
"""Images of each training environment that no ingredient was trained on, for an in-domain accuracy to be measured."""


@dataclass(frozen=True)
class Cell:
    """Images of an environment that are in the same splits of as many ingredients.

    Attributes:
        keys: Indices of the images in their environment.
        shares: Share of the ingredients whose split of each name holds the images.
    """

    keys: list[int]
    shares: Mapping[Split, float]


@dataclass(frozen=True)
class SoupImages:
    """The images of a soup.

    Attributes:
        test_envs: Indices of the test environments.
        cells: Cells by name, e.g. "env0_in", which begins with the environment's.
    """

    test_envs: list[int]
    cells: dict[str, Cell]

    @classmethod
    def of(
        cls,
        members: Sequence[Mapping[str, Any]],
        test_envs: Sequence[int],
        concepts: Sequence[Sequence[str]] = (),
    ) -> "SoupImages":
        """Finds the images of a soup.

        Args:
            members: Record of each ingredient.
            test_envs: Indices of the test environments of the soup.
            concepts: Of each environment, the concept of each image; needed if ingredients were split by concepts.
        """
        cells: dict[str, Cell] = {}
        outs = [_held_out(member, concepts) for member in members]
        for env in range(num_environments(dict(members[0]))):
            splits = [
                _splits(member, env, env in test_envs, out[env] if out else None)
                for member, out in zip(members, outs, strict=True)
            ]
            for name, cell in _cells(splits).items():
                if env in test_envs or 1.0 in cell.shares.values():
                    cells[f"env{env}_{name}"] = cell
        return cls(list(test_envs), cells)

    @property
    def train_envs(self) -> list[int]:
        """Indices of the environments that the ingredients were trained on."""
        return sorted({environment_of(name) for name in self.cells} - set(self.test_envs))

    @property
    def held_out(self) -> dict[int, int]:
        """Number of images that no ingredient was trained on, by training environment."""
        return {
            env: len(self.cells[name].keys) if (name := f"env{env}_out") in self.cells else 0 for env in self.train_envs
        }

    @property
    def has_held_out(self) -> bool:
        """Whether there are enough images to measure the in-domain accuracy on."""
        return min(self.held_out.values()) >= HELD_OUT_LEAST or self._has_same_splits

    @property
    def _has_same_splits(self) -> bool:
        """Whether the ingredients have the same splits: then these are used, however small."""
        return all(1.0 in cell.shares.values() for cell in self.cells.values()) and all(self.held_out.values())

    @property
    def measured(self) -> list[str]:
        """Names of the cells that are evaluated."""
        return [name for name in self.cells if self.has_held_out or name not in self.validation]

    @property
    def validation(self) -> list[str]:
        """Names of the cells that no ingredient was trained on, of the training environments."""
        return [f"env{env}_out" for env in self.train_envs if f"env{env}_out" in self.cells]

    def accuracies(self, of_cells: Mapping[str, float]) -> dict[str, float]:
        """Computes the accuracies on splits.

        Args:
            of_cells: Accuracy on each measured cell, by "env0_in_acc" and so on.

        Returns:
            Accuracy by "env0_in_acc" and so on.
        """
        parts: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, cell in self.cells.items():
            for split, share in cell.shares.items():
                if (value := of_cells.get(f"{name}_acc")) is not None:
                    parts[f"env{environment_of(name)}_{split}_acc"].append((share * len(cell.keys), value))
        return {name: _weighted_mean(part) for name, part in sorted(parts.items())}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images behind each accuracy, as records hold it under "split_sizes"; of a test split the mean."""
        sizes: defaultdict[str, float] = defaultdict(float)
        for env in self.train_envs:
            sizes |= {f"env{env}_{split}": 0.0 for split in ("in", "out")}
        for name, cell in self.cells.items():
            for split, share in cell.shares.items():
                if name in self.measured:
                    sizes[f"env{environment_of(name)}_{split}"] += share * len(cell.keys)
        return {name: round(size) for name, size in sorted(sizes.items())}

    def why_unmeasured(self, labels: Sequence[str]) -> str:
        """Says why there is no in-domain accuracy; empty if there is one.

        Args:
            labels: Labels of the environments.
        """
        if self.has_held_out:
            return ""
        env = min(self.held_out, key=lambda env: self.held_out[env])
        return (
            f"no in-domain accuracy: {self.held_out[env] or 'no'} images of {labels[env]} are held out by all "
            f"ingredients, and at least {HELD_OUT_LEAST} are needed"
        )


def is_split_by_concepts(member: Mapping[str, Any]) -> bool:
    """Whether a run held out concepts, not images.

    Args:
        member: Record of the run.
    """
    return bool(member["args"].get("split_by") == CONCEPTS)


def _held_out(member: Mapping[str, Any], concepts: Sequence[Sequence[str]]) -> list[set[int]] | None:
    """The images of the concepts that an ingredient held out, by environment; None if it held out images."""
    args = member["args"]
    if not is_split_by_concepts(member):
        return None
    return held_out_concepts(concepts, args["holdout_fraction"], args["trial_seed"])


def _splits(member: Mapping[str, Any], env: int, is_test: bool, out: set[int] | None) -> dict[str, list[int]]:
    """The splits of an environment in the trial of an ingredient."""
    args, sizes = member["args"], member["split_sizes"]
    size = sum(sizes.get(f"env{env}_{split}", 0) for split in SPLITS)
    uda = args.get("uda_holdout_fraction", 0.0) if is_test else None
    return split_environment(size, args["holdout_fraction"], uda, args["trial_seed"], env, out)


def _cells(splits: Sequence[Mapping[str, list[int]]]) -> dict[str, Cell]:
    """The cells of an environment, those that are a split of all ingredients by its name, in the order of the first."""
    of_key: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for each in splits:
        for split, keys in each.items():
            for key in keys:
                of_key[key][split] += 1
    groups: dict[tuple[int, ...], list[int]] = {}
    in_order = [key for split in SPLITS for key in splits[0][split]]
    for key in in_order:
        groups.setdefault(tuple(of_key[key][split] for split in SPLITS), []).append(key)
    cells = {}
    for counts, keys in groups.items():
        shares = {split: count / len(splits) for split, count in zip(SPLITS, counts, strict=True) if count}
        whole = next((split for split, share in shares.items() if math.isclose(share, 1.0)), None)
        cells[whole or "cell" + "-".join(map(str, counts))] = Cell(keys, shares)
    return cells


def _weighted_mean(parts: Sequence[tuple[float, float]]) -> float:
    """The mean of values by their weights; of one value that value, to the last bit."""
    if len(parts) == 1:
        return parts[0][1]
    return sum(weight * value for weight, value in parts) / sum(weight for weight, _ in parts)
