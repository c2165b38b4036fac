"""Which soups there are to make of a sweep's finished runs.

A soup over trials is of the runs that training-domain validation selects in each trial, which are those behind the
method's row in the tables; one over training domains is of the selected single-source runs of a trial; one over
hyperparameters is of all runs of a method in a trial with the same test domain. Torch is not imported here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from domainbed_ext.algorithms.derived_names import join_derived
from domainbed_ext.algorithms.names import canonical_name
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.model_selection import (
    SOURCE_HOLDOUT,
    TRAINING_DOMAIN,
    Record,
    best_step,
    num_environments,
    training_environments,
)
from domainbed_ext.protocols import LEAVE_ONE_OUT, SINGLE_SOURCE, protocol_of
from domainbed_ext.report.environments import dataset_order
from domainbed_ext.report.methods import algorithm_order
from domainbed_ext.runs.derived import Candidate, Derived
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.saved import Moved, Saved, find_saved

Over = Literal["trials", "hparams", "domains"]
OVER: tuple[Over, ...] = get_args(Over)
Kind = Literal["uniform", "greedy"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TELLS = {  # how an error names what a soup is over
    "trials": "one trial",
    "hparams": "one run per trial and test domain",
    "domains": "no single-source runs from all training domains of a test domain",
}
_ALIKE = ("backbone", "image_size")  # hyperparameters that ingredients share
_ALIKE_ADAPTERS = ("rank", "alpha", "rank_stabilised", "targets", "blocks")


@dataclass(frozen=True, eq=False)
class Plan:
    """A soup.

    Attributes:
        sweep_dir: Folder of the sweep.
        over: What its ingredients differ in.
        kind: "uniform" for the mean of all, "greedy" for one of those that improve the validation accuracy.
        members: Record of each run that it may be made of.
        test_envs: Indices of its test environments.
        size: Number of trials of each soup, as it was asked for; None for all.
        merged: Whether adapters that share a frozen factor are averaged as merged weights too.
        moved: Where data, weights and the rest are now.
    """

    sweep_dir: Path
    over: Over
    kind: Kind
    members: tuple[Record, ...]
    test_envs: tuple[int, ...]
    size: int | None = None
    merged: bool = False
    moved: Moved = Moved()  # noqa: RUF009  (it is frozen)

    @property
    def name(self) -> str:
        """What its name adds to the method's, e.g. "soup(trials, greedy)"."""
        over = f"{self.size} trials" if self.size else self.over
        return f"soup({over}{', greedy' if self.kind == 'greedy' else ''})"

    @property
    def row(self) -> tuple[str, str]:
        """Name of its row in the tables, and the data set."""
        args = self.members[0]["args"]
        return join_derived(args["algorithm"], self.name), args["dataset"]

    @cached_property
    def saved(self) -> list[Saved]:
        """What each member saved.

        Raises:
            BenchmarkError: One saved nothing.
        """
        return [find_saved(self.run_folder(member)) for member in self.members]

    @cached_property
    def derived(self) -> Derived:
        """The derived run.

        Raises:
            BenchmarkError: A member saved nothing.
        """
        return replace(self.place, candidates=[Candidate.of(saved) for saved in self.saved])

    @property
    def place(self) -> Derived:
        """The derived run without its candidates, whose folder is the same."""
        args = {"protocol": LEAVE_ONE_OUT, "source_envs": None, "test_envs": list(self.test_envs)}
        return Derived(
            self.sweep_dir,
            self.name,
            self.members[0],
            [],
            args if self.over == "domains" else {},
            sorted({member["args"]["trial_seed"] for member in self.members}),
            {"over": self.over, "greedy": self.kind == "greedy", "merged": self.merged},
        )

    def run_folder(self, member: Record) -> RunFolder:
        """Returns the folder of a member."""
        return RunFolder(self.sweep_dir / member["run"])

    @property
    def environments(self) -> list[str]:
        """Labels of the environments."""
        record = self.members[0]
        return list(record.get("environments") or map(str, range(num_environments(record))))

    def __str__(self) -> str:
        args = self.members[0]["args"]
        tested = ", ".join(self.environments[env] for env in self.test_envs)
        trials = sorted({member["args"]["trial_seed"] for member in self.members})
        return (
            f"{args['algorithm']} {self.name} on {args['dataset']}, tested on {tested}, "
            f"trial{'s' if len(trials) > 1 else ''} {', '.join(map(str, trials))}"
        )

    def check(self) -> None:
        """Checks that the runs have a mean.

        Raises:
            BenchmarkError: They saved nothing, or have different models, adapters or data.
        """
        records = [saved.record for saved in self.saved]
        method = records[0]["args"]["algorithm"]
        names = [*_ALIKE, *([] if self.merged else _ALIKE_ADAPTERS)]
        for name in names:
            values = {str(record["hparams"].get(name)) for record in records}
            if len(values) > 1:
                remedy = "give runs with one" + (", or add --merged" if name in _ALIKE_ADAPTERS else "")
                raise BenchmarkError(
                    f"the runs of {method} differ in {name} ({', '.join(sorted(values))}), so they have no mean: "
                    f"{remedy}"
                )
        for name, what in (
            ("weights_digest", "pretrained weights"),
            ("backbone_digest", "pretrained weights"),
            ("environments", "environments"),
            ("data_digest", "data"),
        ):
            if any(record.get(name) != records[0].get(name) for record in records):
                raise BenchmarkError(
                    f"the runs of {method} differ in their {what}, so they have no mean: keep one kind"
                )


class _Key(NamedTuple):
    """What the runs of a row have in common, but for trial and hyperparameters."""

    dataset: str
    algorithm: str
    protocol: str
    test_envs: tuple[int, ...]


class Sweep:
    """The finished runs that soups are made of.

    Args:
        sweep_dir: Folder of the sweep.
        records: All records of its finished runs.
    """

    def __init__(self, sweep_dir: Path, records: Iterable[Record]) -> None:
        self.sweep_dir = sweep_dir
        self._rows: defaultdict[_Key, defaultdict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            args = record["args"]
            protocol = SINGLE_SOURCE if protocol_of(record) == SINGLE_SOURCE else LEAVE_ONE_OUT
            if "derived" not in record and (protocol == SINGLE_SOURCE or len(args["test_envs"]) == 1):
                key = _Key(args["dataset"], args["algorithm"], protocol, tuple(args["test_envs"]))
                self._rows[key][args["trial_seed"]].append(record)
        self._count = {key.dataset: num_environments(next(iter(row.values()))[0]) for key, row in self._rows.items()}

    @property
    def algorithms(self) -> list[str]:
        """Names of the methods that there are runs of, in the order of tables."""
        return sorted({key.algorithm for key in self._rows}, key=algorithm_order)

    def plans(
        self,
        over: Sequence[Over],
        kinds: Sequence[Kind],
        algorithms: Sequence[str] | None = None,
        size: int | None = None,
        merged: bool = False,
        moved: Moved = Moved(),  # noqa: B008  (it is frozen)
    ) -> list[Plan]:
        """Plans the soups.

        Args:
            over: What ingredients differ in.
            kinds: Kinds of soups.
            algorithms: Names of methods, in any spelling; None for all.
            size: Number of trials of each soup over trials; None for all.
            merged: Whether adapters that share a frozen factor are averaged as merged weights too.
            moved: Where data, weights and the rest are now.

        Returns:
            Plans in the order of tables; none where there are no two runs to average.

        Raises:
            BenchmarkError: There are no runs of a method.
        """
        wanted = self._find(algorithms)
        found = {"trials": self._over_trials(size), "hparams": self._over_hparams(), "domains": self._over_domains()}
        plans = [
            Plan(self.sweep_dir, each, kind, members, envs, size if each == "trials" else None, merged, moved)
            for each in over
            for members, envs in found[each]
            for kind in kinds
            if members[0]["args"]["algorithm"] in wanted
        ]
        return sorted(plans, key=_order)

    def _find(self, algorithms: Sequence[str] | None) -> list[str]:
        if algorithms is None:
            return self.algorithms
        names = [name if name in self.algorithms else canonical_name(name) for name in algorithms]
        for name in names:
            if name not in self.algorithms:
                raise unknown("method of these runs in --algorithms:", name, self.algorithms)
        return names

    def _over_trials(self, size: int | None) -> Iterator[tuple[tuple[Record, ...], tuple[int, ...]]]:
        for key, by_trial in self._rows.items():
            chosen = [_select(records, key) for _, records in sorted(by_trial.items())]
            step = size or len(chosen)
            for start in range(0, len(chosen) - step + 1, step):
                if step > 1:
                    yield tuple(chosen[start : start + step]), key.test_envs

    def _over_hparams(self) -> Iterator[tuple[tuple[Record, ...], tuple[int, ...]]]:
        for key, by_trial in self._rows.items():
            for _, records in sorted(by_trial.items()):
                runs: defaultdict[tuple[int, str], list[Record]] = defaultdict(list)
                for record in records:
                    runs[record["args"]["hparams_seed"], record["run"]].append(record)
                if len(runs) > 1:
                    yield tuple(best_step(runs[run]) for run in sorted(runs)), key.test_envs

    def _over_domains(self) -> Iterator[tuple[tuple[Record, ...], tuple[int, ...]]]:
        sources: defaultdict[tuple[str, str, int], dict[int, Record]] = defaultdict(dict)
        for key, by_trial in self._rows.items():
            if key.protocol == SINGLE_SOURCE:
                for trial, records in by_trial.items():
                    (source,) = training_environments(records[0])
                    sources[key.dataset, key.algorithm, trial][source] = _select(records, key)
        for (dataset, _, _), of_source in sorted(sources.items()):
            for env in range(self._count[dataset]):
                members = [of_source[source] for source in sorted(of_source) if source != env]
                if len(members) == self._count[dataset] - 1 > 1:
                    yield tuple(members), (env,)


def nothing_to_do(over: Sequence[Over], size: int | None) -> BenchmarkError:
    """The error where there are no two runs to average.

    Args:
        over: What ingredients should differ in.
        size: Number of trials of each soup; None for all.
    """
    lacks = [f"fewer than {size} trials" if each == "trials" and size else _TELLS[each] for each in over]
    return BenchmarkError(
        f"there is no soup to make: the finished runs have {', '.join(lacks)} (--over {' '.join(over)}), and a soup is "
        "the mean of at least two runs"
    )


def _select(records: Sequence[Record], key: _Key) -> Record:
    """The record of a trial that training-domain validation selects."""
    if key.protocol == SINGLE_SOURCE:
        selection = SOURCE_HOLDOUT.select(records, training_environments(records[0])[0])
    else:
        selection = TRAINING_DOMAIN.select(records, key.test_envs[0])
    if selection is None:
        run = records[0]["run"]
        raise BenchmarkError(f"run {run} did not evaluate its test domain at the selected step: run it again")
    return selection.record


def _order(plan: Plan) -> tuple[object, ...]:
    args: Mapping[str, Any] = plan.members[0]["args"]
    return (
        dataset_order(args["dataset"]),
        algorithm_order(args["algorithm"]),
        OVER.index(plan.over),
        KINDS.index(plan.kind),
        plan.test_envs,
        args["trial_seed"],
    )
