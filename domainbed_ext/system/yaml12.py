"""Reads and writes YAML as people write it, by the core schema of YAML 1.2.

`1e-3` is a number, `NO`, `on` and `2024-01-01` are text, `010` is ten, and a duplicate key is an error.
PyYAML reads YAML 1.1, where all of these differ.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, ScalarNode


class Entry(NamedTuple):
    """A `key: value` of a mapping.

    Attributes:
        key: Name.
        value: Plain Python value.
        line: Line of the key, from 1.
    """

    key: Any
    value: Any
    line: int


def read_mapping(text: str) -> list[Entry] | None:
    """Reads a document that is one mapping.

    Args:
        text: YAML.

    Returns:
        Its entries, in order; None if it is something else.

    Raises:
        yaml.YAMLError: If it is not YAML, or has a duplicate key.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, MappingNode):
            return None
        loader.flatten_mapping(node)
        return [
            Entry(loader.construct_object(key, deep=True), loader.construct_object(value, deep=True), _line(key))
            for key, value in node.value
        ]
    finally:
        loader.dispose()


def write_mapping(mapping: Mapping[str, Any]) -> str:
    """Writes a mapping, a line for each key, so that `read_mapping` and readers of YAML 1.1 read the same.

    Args:
        mapping: Plain values by key.
    """
    lines = _Lines(mapping)
    return yaml.dump(lines, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=None)


class _Lines(dict[str, Any]):
    """A mapping of which each key has a line."""


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes text that is something else in YAML 1.2 too."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    plain = _Loader("").resolve(ScalarNode, text, (True, False)) == _TEXT
    return dumper.represent_scalar(_TEXT, text, style=None if plain else "'")


_TEXT = "tag:yaml.org,2002:str"
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(
    _Lines, lambda dumper, lines: dumper.represent_mapping("tag:yaml.org,2002:map", lines, flow_style=False)
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the types of YAML 1.2, and merge keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's; filled below)

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Refuses a duplicate key."""
        node: MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_yaml_int(self, node: ScalarNode) -> int:
        """Reads decimal numbers, and others by their 0o or 0x."""
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _resolve(kind: str, pattern: str, first: Sequence[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), list(first))


_resolve("null", "~|null|Null|NULL|", ["~", "n", "N", ""])
_resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolve("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789")
_resolve("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.")
_resolve("merge", "<<", "<")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
