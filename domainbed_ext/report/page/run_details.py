"""What the page tells of a run on request, as JSON: its curves, its commands and what it recorded.

What all runs share is there once.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import (
    Record,
    accuracy,
    target_accuracy,
    training_environments,
    trials_of,
)
from domainbed_ext.protocols import CONCEPTS, protocol_of
from domainbed_ext.report.page.runs import Run
from domainbed_ext.system import strict_json

Commands = Callable[[Record], Mapping[str, str]]
"""Function of a run's record that returns commands by what they do."""

Pairs = list[tuple[str, str]]
Groups = dict[str, dict[str, str]]


def details_json(
    runs: Sequence[Run],
    records: Mapping[str, Sequence[Record]],
    labels: Mapping[str, Sequence[str]],
    commands: Commands,
) -> Markup:
    """The details of runs, for a script element of a page.

    Args:
        runs: Runs of the page.
        records: Records of each run.
        labels: Labels of each data set's environments.
        commands: Function that returns a run's commands.

    Returns:
        JSON without `<`.
    """
    groups = {run.anchor: _groups(run.record) for run in runs}
    common = _common(list(groups.values()))
    anchors = {run.name: run.anchor for run in runs}
    document = {
        "common": common,
        "runs": {
            run.anchor: {
                "facts": _facts(run, records[run.name]),
                "groups": _without(groups[run.anchor], common),
                "environments": _environments(run, records[run.name], labels[run.record["args"]["dataset"]]),
                "commands": commands(run.record),
                "made_of": _ingredients(run.record, anchors),
                "chosen": run.chosen,
                **_curves(run),
            }
            for run in runs
        },
    }
    text = strict_json.dumps(document, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))


def _curves(run: Run) -> dict[str, list[float | None]]:
    """The evaluations, a list for each quantity."""
    return {
        "steps": [moment.step for moment in run.moments],
        "loss": [_rounded(moment.loss, 4) for moment in run.moments],
        "train": [_rounded(moment.train, 1) for moment in run.moments],
        "inside": [_rounded(moment.inside, 1) for moment in run.moments],
        "outside": [_rounded(moment.outside, 1) for moment in run.moments],
    }


def _rounded(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def _facts(run: Run, records: Sequence[Record]) -> Pairs:
    """What tells the run from all others, and how large it was."""
    record, args = run.record, run.record["args"]
    values: dict[str, object] = {
        "folder": run.name,
        "selected": f"step {', '.join(map(str, run.chosen))}" if run.chosen else "not in these tables",
        "protocol": protocol_of(record),
        "test envs": args.get("test_envs"),
        "steps": args.get("steps"),
        "epochs": f"{record['epoch']:.1f}" if _is_number(record.get("epoch")) else None,
        "images a step": images_a_step(record),
        "training time": _training_time(records),
        "trainable parameters": _count(record.get("trainable_parameters")),
        "total parameters": _count(record.get("total_parameters")),
        **{name.replace("_", " "): args.get(name) for name in ("trial_seed", "hparams_seed", "seed")},
        "holdout fraction": args.get("holdout_fraction"),
        "split by": CONCEPTS if args.get("split_by") == CONCEPTS else None,
        "trials": ", ".join(map(str, trials)) if len(trials := trials_of(record)) > 1 else None,
        "precision": record.get("precision"),
        "diverged": f"at step {record.get('first_nonfinite_step', '?')}" if run.state == "diverged" else None,
        **_derived(record.get("derived") or {}),
    }
    return [(name, in_words(value)) for name, value in values.items() if value is not None]


def _derived(derived: Mapping[str, Any]) -> dict[str, object]:
    return {"strength": derived.get("strength"), "not measured": derived.get("unmeasured")} if derived else {}


def images_a_step(record: Record) -> int | None:
    """The images of a training step, of all training domains together; None if it was not recorded.

    Args:
        record: One of the run's records.
    """
    hparams = record.get("hparams") or {}
    batch = hparams.get("batch_size")
    return batch * (hparams.get("accumulate") or 1) * len(training_environments(record)) if batch else None


def _training_time(records: Sequence[Record]) -> str | None:
    """The time of all steps, without evaluation; None if it was not recorded."""
    seconds, before = 0.0, -1
    for record in sorted(records, key=lambda record: record["step"]):
        if not _is_number(record.get("step_time")):
            return None
        seconds += record["step_time"] * (record["step"] - before)
        before = record["step"]
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _environments(run: Run, records: Sequence[Record], labels: Sequence[str]) -> Pairs:
    """The accuracy on each environment at the step that is shown."""
    record = next(record for record in records if record["step"] == run.shown.step)
    pairs = []
    for env, label in enumerate(labels):
        outside = env in record["args"]["test_envs"]
        try:
            value = target_accuracy(record, env) if outside else accuracy(record, env, "out")
        except (BenchmarkError, KeyError):  # not measured in a lean run
            continue
        if math.isfinite(value):
            pairs.append((f"{label} ({'OOD' if outside else 'ID'})", f"{100 * value:.1f}"))
    return pairs


def _ingredients(record: Record, anchors: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The runs that a derived run is made of: weight, name, and anchor if the page lists it."""
    derived = record.get("derived") or {}
    pairs = zip(derived.get("ingredients", ()), derived.get("weights", ()), strict=True)
    return [(f"{weight:.4g}", name, anchors.get(name, "")) for name, weight in pairs]


def _groups(record: Record) -> Groups:
    """Hyperparameters, versions and machine, in words."""
    recorded = {
        "Hyperparameters": _effective(record),
        "Versions": record.get("versions") or {},
        "Machine": record.get("machine") or {},
    }
    return {
        heading: {name: in_words(value) for name, value in sorted(facts.items())}
        for heading, facts in recorded.items()
        if facts
    }


def _effective(record: Record) -> dict[str, Any]:
    """Hyperparameters, with what the run used where the value stands for another."""
    hparams = dict(record.get("hparams") or {})
    if "alpha" in hparams and hparams["alpha"] is None and hparams.get("rank"):
        hparams["alpha"] = 2 * hparams["rank"]
    if hparams.get("precision") == "auto" and record.get("precision"):
        hparams["precision"] = record["precision"]
    architecture = str(hparams.get("backbone", "")).split(".")[0]
    if "image_size" in hparams and hparams["image_size"] is None and (size := re.search(r"_(\d{2,4})$", architecture)):
        hparams["image_size"] = int(size[1])
    return hparams


def _common(groups: Sequence[Groups]) -> Groups:
    """What all runs have with the same value."""
    if not groups:
        return {}
    shared: Groups = {}
    for heading, facts in groups[0].items():
        same = {
            name: value
            for name, value in facts.items()
            if all(other.get(heading, {}).get(name) == value for other in groups)
        }
        if same:
            shared[heading] = same
    return shared


def _without(groups: Groups, common: Groups) -> Groups:
    own = {
        heading: {name: value for name, value in facts.items() if name not in common.get(heading, {})}
        for heading, facts in groups.items()
    }
    return {heading: facts for heading, facts in own.items() if facts}


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def in_words(value: object) -> str:
    """A recorded value as text.

    Args:
        value: Any JSON.
    """
    if value is None:
        return "none"
    return value if isinstance(value, str) else strict_json.dumps(value, ensure_ascii=False)


def distinct(records: Iterable[Record], key: str) -> list[tuple[dict[str, str], int]]:
    """What runs recorded under a key, in words, and how many recorded the same.

    Args:
        records: A record of each run.
        key: Key of a dictionary.
    """
    counts: dict[str, int] = {}
    values: dict[str, dict[str, str]] = {}
    for record in records:
        if value := record.get(key):
            text = strict_json.dumps(value, sort_keys=True)
            counts[text] = counts.get(text, 0) + 1
            values[text] = {name: in_words(fact) for name, fact in sorted(value.items())}
    return [(values[text], count) for text, count in counts.items()]
