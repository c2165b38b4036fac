"""The model card of an adapter: the README.md of its repository on the Hugging Face hub."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch

from vitlorafa.config import AdapterConfig, parse_number
from vitlorafa.errors import AdapterError
from vitlorafa.origin import model_name

_METHODS = {"BA": "LoRA", "B": "LoRA-FA", "A": "LoRA-FB"}
_TRAINED = {"BA": "A and B train", "B": "A is frozen, B trains", "A": "B is frozen, A trains"}


@dataclass(frozen=True)
class ModelCard:
    """What a model card says beside what the adapter knows itself; what is not given is left out.

    Attributes:
        dataset: Name of the data set that the adapter was trained on.
        held_out: Name of the domain that it was not trained on.
        metrics: Value of each metric, or value, lower and upper end of its 95 % interval.
        licence: Identifier of the adapter's licence on the hub, such as "mit" or "apache-2.0".
        details: Further facts by name, such as the learning rate.
        versions: Versions of packages that it was trained with; if None, the ones that are installed.
        description: Sentences of your own, in Markdown.

    Raises:
        AdapterError: On construction, if a metric is neither a number nor a value with its interval.
    """

    dataset: str | None = None
    held_out: str | None = None
    metrics: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    licence: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] | None = None
    description: str = ""

    def __post_init__(self) -> None:
        for name in self.metrics:
            self.interval(name)

    def interval(self, name: str) -> tuple[float, ...]:
        """A metric: its value, or value, lower and upper end.

        Args:
            name: Name of the metric.

        Raises:
            AdapterError: If it is something else.
        """
        given: Any = self.metrics[name]
        numbers = given if isinstance(given, (tuple, list)) else (given,)
        values = tuple(parse_number(f"metric {name!r}", each) for each in numbers)
        if len(values) not in (1, 3) or (len(values) == 3 and not values[1] <= values[0] <= values[2]):
            raise AdapterError(f"metric {name!r} must be a number, or (value, lower end, upper end), not {given!r}")
        return values

    def text(self, repo_id: str, description: Mapping[str, Any], classes: int, for_peft: bool) -> str:
        """The card, as Markdown with YAML at its top.

        Args:
            repo_id: Name of the repository.
            description: Content of `adapter.json`.
            classes: Number of classes of the saved head; 0 if none was saved.
            for_peft: Whether PEFT can load the folder.
        """
        config = AdapterConfig.from_dict(description["config"])
        backbone = model_name(description)
        parts = [
            f"---\n{self._front_matter(repo_id, description, config, for_peft)}---",
            f"# {repo_id.rpartition('/')[2]}",
            f"A {_METHODS[config.train]} adapter"
            + (f" of [{backbone}](https://huggingface.co/timm/{backbone})" if backbone else "")
            + (f", trained on {self.dataset}" if self.dataset else "")
            + (f" without the domain {self.held_out}, which was held out" if self.held_out else "")
            + ".",
            self.description.strip(),
            self._results(),
            _how_to_load(repo_id, backbone, classes, for_peft),
            _table("Adapter", self._adapter(description, config)),
            _table("Input", {name: _plain(value) for name, value in (description.get("input") or {}).items()}),
            _table("Versions", self.versions or _versions()),
            f"## Licence\n\n{self.licence or 'None was stated.'} The licence of the backbone applies to the backbone.",
        ]
        return "\n\n".join(filter(None, parts)) + "\n"

    def _front_matter(self, repo_id: str, description: Mapping[str, Any], config: AdapterConfig, for_peft: bool) -> str:
        backbone = model_name(description)
        values: dict[str, Any] = {"library_name": "peft" if for_peft else "vitlorafa"}
        if self.licence:
            values["license"] = self.licence
        if backbone:
            values |= {"base_model": f"timm/{backbone}", "base_model_relation": "adapter"}
        values["pipeline_tag"] = "image-classification"
        values["tags"] = ["vitlorafa", "timm", *dict.fromkeys(("lora", _METHODS[config.train].lower()))]
        if self.metrics and self.dataset:
            held_out = f", held-out domain {self.held_out}" if self.held_out else ""
            metrics = [{"type": "accuracy", "name": name, "value": self.interval(name)[0]} for name in self.metrics]
            result = {
                "task": {"type": "image-classification"},
                "dataset": {"type": self.dataset, "name": f"{self.dataset}{held_out}"},
                "metrics": metrics,
            }
            values["model-index"] = [{"name": repo_id.rpartition("/")[2], "results": [result]}]
        import yaml  # comes with huggingface_hub; the rest of the package does without

        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return text

    def _results(self) -> str:
        if not self.metrics:
            return ""
        lines = ["## Results", "", "| metric | value | 95 % interval |", "| --- | ---: | ---: |"]
        for name in self.metrics:
            value, *ends = self.interval(name)
            lines.append(f"| {_plain(name)} | {value:g} | {f'{ends[0]:g} to {ends[1]:g}' if ends else 'not known'} |")
        return "\n".join(lines)

    def _adapter(self, description: Mapping[str, Any], config: AdapterConfig) -> dict[str, Any]:
        names = description.get("class_names")
        return {
            "method": f"{_METHODS[config.train]}: {_TRAINED[config.train]}",
            "rank": config.rank,
            "alpha": f"{config.alpha:g}",
            "projections": ", ".join(config.targets),
            "start of A, B": f"{config.init_A}, {config.init_B}",
            **({"classes": ", ".join(names)} if names else {}),
            **self.details,
        }


def _how_to_load(repo_id: str, backbone: str | None, classes: int, for_peft: bool) -> str:
    create = f'timm.create_model("{backbone}", pretrained=True, num_classes={classes})' if backbone else "..."
    lines = [
        "## How to load it",
        "",
        "```python",
        "import timm",
        "from vitlorafa import from_pretrained, merge_and_unload",
        "",
        f"model = {create}",
        f'from_pretrained(model, "{repo_id}")',
        "merge_and_unload(model)  # optional: a plain model without adapters, as fast as before",
        "```",
    ]
    if for_peft:
        lines += [
            "",
            "Or with [PEFT](https://github.com/huggingface/peft):",
            "",
            "```python",
            "import timm",
            "from peft import PeftModel",
            "",
            f"model = {create}",
            f'model = PeftModel.from_pretrained(model, "{repo_id}")',
            "```",
        ]
    return "\n".join(lines)


def _table(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = [f"| {_plain(name)} | {_plain(value)} |" for name, value in values.items()]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *rows])


def _plain(value: Any) -> str:
    """A value as the text of a table's cell."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _versions() -> dict[str, str]:
    from vitlorafa import __version__

    return {
        "vitlorafa": __version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
