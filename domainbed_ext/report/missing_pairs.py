"""The runs with two test environments that leave-one-domain-out cross-validation lacks."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from domainbed_ext.model_selection import Record


class Pairs:
    """The pairs of test environments that there are runs of.

    Args:
        records: Records of leave-one-out runs.
        environments: Labels of each data set's environments.
        algorithms: Ids of the methods, in the order of tables.
    """

    def __init__(
        self, records: Iterable[Record], environments: Mapping[str, Sequence[str]], algorithms: Sequence[str]
    ) -> None:
        self._environments = environments
        self._algorithms = algorithms
        self._seeds: defaultdict[tuple[str, str, tuple[int, ...]], set[tuple[int, int]]] = defaultdict(set)
        for record in records:
            args = record["args"]
            key = args["dataset"], args["algorithm"], tuple(sorted(args["test_envs"]))
            self._seeds[key].add((args["trial_seed"], args["hparams_seed"]))

    def missing(self, dataset: str, algorithm: str) -> list[tuple[str, str]]:
        """Returns the pairs without a run for some trial and hparams_seed that runs with one test environment have.

        Args:
            dataset: Name of the data set.
            algorithm: Id of the method.

        Returns:
            Labels of the two environments of each pair.
        """
        labels = self._environments[dataset]
        if len(labels) < 3:  # a pair would leave none to train on
            return []
        singles = [self._seeds.get((dataset, algorithm, (env,)), set()) for env in range(len(labels))]
        return [
            (labels[i], labels[j])
            for i, j in itertools.combinations(range(len(labels)), 2)
            if (singles[i] | singles[j]) - self._seeds.get((dataset, algorithm, (i, j)), set())
        ]

    def sentence(self, dataset: str) -> str:
        """What is missing on a data set and how to get it; empty if nothing."""
        count = len(self._environments[dataset])
        if count < 3:
            return (
                f"Leave-one-domain-out cross-validation takes at least three environments, and {dataset} has {count}."
            )
        possible = count * (count - 1) // 2
        parts = [
            f"{algorithm} ({', '.join(map('+'.join, missing)) if len(missing) < possible else f'all {possible}'})"
            for algorithm in self._algorithms
            if (missing := self.missing(dataset, algorithm))
        ]
        if not parts:
            return ""
        return (
            f"Leave-one-domain-out cross-validation needs a run for every pair of test environments; missing on "
            f"{dataset}: {', '.join(parts)}. Launch the sweep with --pairs."
        )
