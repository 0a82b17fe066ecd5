"""YAML as the configuration is written in it: a part of YAML 1.1 in which nothing is silently something else.

A key given twice, a date, an octal number: each is an error with its line instead of a value that nobody meant.
Whatever the file holds, reading it takes little time and memory. It must not know what the keys mean.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vllm_wanspec.config.files import bounded_text
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import masked_url, printable

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 10_000
"""With anchors expanded, each as often as it is named."""
MAX_DIGITS = 18
OWN = "x-"
"""Top-level keys and keys of list items' mappings that begin so are the user's own."""
_TAG = "tag:yaml.org,2002:"
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FRACTION = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_ENDLESS = {"inf": math.inf, "+inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_OTHER_FORM = re.compile(
    r"[-+]?(0[0-9_]+|0o[0-7_]+|0[xX][0-9a-fA-F_]+|0[bB][01_]+|[0-9]+_[0-9_]*|[0-9][0-9_]*(:[0-5]?[0-9])+)(\.[0-9_]*)?"
)
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_yaml(path: str | Path) -> Any:
    """Read a file's one document; keys of the user's own are left out.

    Raises:
        ConfigError: It cannot be read, or is not such YAML; one line, with the file and the line in it.
    """
    shown = printable(str(path), 1000)
    try:
        text = bounded_text(path, MAX_BYTES)
        try:
            root = _Loader(text).get_single_node()
        except yaml.YAMLError as error:
            raise ConfigError(f"is not valid YAML{_explained(error, text)}") from error
        except (ValueError, OverflowError) as error:  # as PyYAML meets "\UFFFFFFFF" or %YAML with endless digits
            raise ConfigError("is not valid YAML: it holds an escape or a directive that is out of range") from error
        if root is None:
            return None
        _check_size(root)
        return _value(root, ())
    except ConfigError as error:
        raise ConfigError(f"{shown}: {error}") from error


def other_form(text: str) -> str | None:
    """What is wrong with a number that is not plainly decimal, as ``010`` or ``1_000``; None for any other text."""
    if not _OTHER_FORM.fullmatch(text):
        return None
    what = "not a decimal number"
    if _OCTAL.fullmatch(text) and len(text) <= MAX_DIGITS:
        what = f"an octal number to YAML, {int(text.replace('_', ''), 8)}"
    return f"{printable(text, 40)} is {what}; write it in decimal, or in quotes where text is meant"


class _Loader(yaml.SafeLoader):
    """PyYAML's loader as far as nodes: refuses what is nested too deep, and keys given twice."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH or self.count > MAX_VALUES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            what = f"nested more than {MAX_DEPTH} deep" if self.depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise ConfigError(f"line {mark.line + 1}: {what}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        tagged = self.peek_event().tag is not None  # type: ignore[no-untyped-call]
        node = super().compose_scalar_node(anchor)
        if tagged and node.tag == f"{_TAG}str":
            node.style = "'"  # text, as if it were in quotes
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                continue
            same = key.tag, key.value
            if same in first:
                raise ConfigError(
                    f"{_line(key)}: the key {printable(masked_url(key.value), 60)} is given twice "
                    f"(first at line {first[same]}); keep one of them"
                )
            first[same] = key.start_mark.line + 1
        return node


def _explained(error: yaml.YAMLError, text: str) -> str:
    """Where the file stops to be YAML, and why."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f" at line {line}: it holds the character U+{ord(text[error.position]):04X}"
    mark = getattr(error, "problem_mark", None)
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    what = printable(str(getattr(error, "problem", None) or "cannot parse"))
    if what == "but found another document":
        what = "a second document begins here; keep one"
    elif "'\\t'" in what:
        what += "; indent with spaces, not with tabs"
    return f"{where}: {what}"


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_size(root: yaml.Node) -> None:
    """Refuse what anchors make endless, too deep or too large; takes time by the nodes that are written."""
    known: dict[int, tuple[int, int]] = {}
    within: set[int] = set()

    def measured(node: yaml.Node) -> tuple[int, int]:
        if id(node) in known:
            return known[id(node)]
        if id(node) in within:
            raise ConfigError(f"{_line(node)}: an anchor holds itself")
        within.add(id(node))
        parts = [measured(child) for child in _children(node)]
        within.discard(id(node))
        size = known[id(node)] = (
            1 + sum(values for values, _ in parts),
            1 + max((depth for _, depth in parts), default=0),
        )
        if size[0] > MAX_VALUES:
            raise ConfigError(f"{_line(node)}: more than {MAX_VALUES} values, anchors expanded")
        if size[1] > MAX_DEPTH:
            raise ConfigError(f"{_line(node)}: nested more than {MAX_DEPTH} deep, anchors expanded")
        return size

    measured(root)


def _value(node: yaml.Node, place: tuple[str | int, ...]) -> Any:
    """A node's value; ``place``: the keys and indices that lead to it."""
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, kind)
    if kind not in {"map", "seq"} or (kind == "map") != isinstance(node, yaml.MappingNode):
        raise _unknown_tag(node)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place)
    return [_value(item, (*place, index)) for index, item in enumerate(node.value)]


def _mapping(node: yaml.MappingNode, place: tuple[str | int, ...]) -> dict[str, Any]:
    own_allowed = not place or isinstance(place[-1], int)
    merged: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for key, value in node.value:
        if key.tag == f"{_TAG}merge":
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for part in reversed(parts):  # the first of a list wins
                if not isinstance(part, yaml.MappingNode):
                    raise ConfigError(f"{_line(key)}: << takes a mapping or a list of mappings")
                merged.update(_mapping(part, place))
            continue
        name = _key(key)
        if not (own_allowed and name.startswith(OWN) and name != OWN):
            given[name] = _value(value, (*place, name))
    return {**merged, **given}


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise ConfigError(f"{_line(node)}: a key is not text")
    if node.tag not in {f"{_TAG}str", f"{_TAG}value"}:
        raise ConfigError(
            f"{_line(node)}: the key {printable(masked_url(node.value), 60)} is not text to YAML; put it in quotes"
        )
    return str(node.value)


def _scalar(node: yaml.ScalarNode, kind: str) -> Any:
    text = str(node.value)
    plain = node.style is None
    if plain and kind in {"int", "float", "str"} and (wrong := other_form(text)):
        raise ConfigError(f"{_line(node)}: {wrong}")
    if kind in {"int", "float"} or (plain and kind == "str" and _FRACTION.fullmatch(text)):
        return _number(node, text, kind)
    if kind in {"str", "value", "merge"}:
        return text
    if kind == "bool" and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if kind == "null":
        return None
    shown = printable(text, 40)
    if kind == "timestamp":
        raise ConfigError(f"{_line(node)}: {shown} is a date (timestamp) to YAML; put it in quotes")
    if kind == "bool":
        raise ConfigError(f"{_line(node)}: {shown} is neither true nor false")
    raise _unknown_tag(node)


def _number(node: yaml.ScalarNode, text: str, kind: str) -> int | float:
    if len(text) > 2 * MAX_DIGITS or (_DECIMAL.fullmatch(text) and len(text) > MAX_DIGITS):
        raise ConfigError(f"{_line(node)}: {printable(text, 40)} has too many digits ({len(text)})")
    if kind == "int" and _DECIMAL.fullmatch(text):
        return int(text)
    endless = _ENDLESS.get(text.lower().replace(".", "", 1)) if "." in text else None
    if endless is not None and kind == "float":
        return endless
    if kind != "int" and _FRACTION.fullmatch(text) and math.isfinite(value := float(text)):
        return value
    raise ConfigError(f"{_line(node)}: {printable(text, 40)} is no number that can be used")


def _unknown_tag(node: yaml.Node) -> ConfigError:
    tag = printable(node.tag.replace(_TAG, "!!"), 60)
    return ConfigError(f"{_line(node)}: is not valid YAML here: the tag {tag} is not known; leave it out")
