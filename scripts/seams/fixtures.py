"""What was read of a version of vLLM, as a file: what the contract's tests of versions that are not installed read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seams.contract import Need
from seams.reading import MEMBERS, READS, STEPS, TEXTS, Wanted, read_module
from seams.sources import Source

WIDTH = 120


def wanted_of(needs: Iterable[Need]) -> dict[str, Wanted]:
    """Return what the contract needs read of each module, by the modules' names."""
    wanted: dict[str, Wanted] = {}
    for need in needs:
        of_module = wanted.setdefault(need.module, Wanted())
        of_module.names.add(need.name.partition(".")[0])
        if need.class_name is not None:
            kinds = ({MEMBERS} if need.is_of_members else set()) | ({need.asks} if need.asks else set())
            of_module.classes.setdefault(need.class_name, set()).update(kinds)
        if need.is_function:
            asked = ((STEPS, need.order), (READS, need.reads), (TEXTS, need.says))
            of_module.functions.setdefault(need.name, set()).update(kind for kind, what in asked if what)
    return dict(sorted(wanted.items()))


def digest(needs: Iterable[Need]) -> str:
    """Return a text by which a file tells that it was made for another contract."""
    asked = [
        (module, sorted(one.names), *(sorted((name, *sorted(kinds)) for name, kinds in of.items()) for of in parts))
        for module, one in wanted_of(needs).items()
        for parts in [(one.classes, one.functions)]
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def read_source(source: Source, needs: Sequence[Need]) -> dict[str, Any]:
    """Return what a vLLM has of the modules, classes and functions that the contract names.

    Returns:
        ``vllm``, its version; ``asked``, the digest of what was asked for; and ``modules``, without those that are not
        there.
    """
    texts = {module: (source.module(module), one) for module, one in wanted_of(needs).items()}
    return {
        "vllm": source.version,
        "asked": digest(needs),
        "modules": {module: read_module(text, one) for module, (text, one) in texts.items() if text is not None},
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield what is another in a second record, a line each; values of lists by themselves, not by their places."""
    for key in sorted({*before, *after}):
        old, new, place = before.get(key), after.get(key), f"{path}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, f"{place}: ")
        elif old != new and isinstance(old, list) and isinstance(new, list):
            gone, come = ([one for one in this if one not in other] for this, other in ((old, new), (new, old)))
            yield f"{place}: {'; '.join(_told(gone, come)) or 'another order'}"
        elif old != new:
            yield f"{place}: {'gone' if new is None else 'new' if old is None else f'{old!r} became {new!r}'}"


def _told(gone: Sequence[str], come: Sequence[str]) -> Iterator[str]:
    for word, items in (("gone", gone), ("new", come)):
        if items:
            yield f"{word} {', '.join(items)}"


def load(path: Path) -> dict[str, Any]:
    """Return what a file holds."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def dump(record: dict[str, Any]) -> str:
    """Return the text of a file: a line for each thing that may change by itself."""
    return f"{_text(record, '')}\n"


def _text(value: Any, indent: str) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or (len(indent) + len(flat) <= WIDTH and not _is_tree(value)):
        return flat
    inner = f"{indent} "
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(key)}: {_text(one, inner)}" for key, one in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    lines = [inner]
    for item in (json.dumps(one, ensure_ascii=False) for one in value):
        if lines[-1] != inner and len(lines[-1]) + len(item) >= WIDTH:
            lines.append(inner)
        lines[-1] += f"{item}, "
    return "[\n" + "\n".join(line.rstrip() for line in lines).rstrip(",") + f"\n{indent}]"


def _is_tree(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(one, dict | list) and one for one in value.values())
