"""What is there: modules, classes and functions of vLLM's source as plain data, by parsing; nothing is imported or run.

What is read of a module is what any version can have, so that two versions, and what is needed, can be compared:

- names that its statements bind at the top level, of those that it imports the ones asked for, and values of names that
  are bound to strings or numbers;
- of a class the names of its methods, and, where asked for, decorators, bases, fields, what ``__init__`` and
  ``__post_init__`` assign to ``self``, and what it asks of something of its own, such as ``self.speculator``;
- of a function its parameters, and, where asked for, its *steps*, its *reads*, and short texts in it.

Steps are what a body does, in the order of evaluation as far as the text shows it: calls by the name of what is called
(``self.add_requests``) and assignments of a name or a call (``self.req_states.draft_tokens[] = draft_tokens``). Reads
are the names that it loads, with attributes (``self.req_states.draft_tokens``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST = 60
"""Characters of a default, or of what is called, that are worth telling apart."""
MAKERS = ("__init__", "__post_init__")
MEMBERS, STEPS, READS, TEXTS = "members", "steps", "reads", "texts"
#: What every function does, and no order is about.
# fmt: off
COMMON = frozenset((
    "all", "any", "bool", "cast", "dict", "enumerate", "float", "getattr", "hasattr", "int", "isinstance",
    "len", "list", "map", "max", "min", "range", "set", "sorted", "str", "sum", "super", "tuple", "type", "zip",
))
# fmt: on


@dataclass
class Wanted:
    """What is to be read of a module.

    Attributes:
        names: Names that it binds, which may be imported.
        classes: Classes at its top level, each with what else to read: "members", and names such as
            "self.speculator" to follow.
        functions: Functions, ``name`` or ``Class.name``, each with what else to read: "steps", "reads",
            "texts".
    """

    names: set[str] = field(default_factory=set)
    classes: dict[str, set[str]] = field(default_factory=dict)
    functions: dict[str, set[str]] = field(default_factory=dict)


def read_module(text: str, wanted: Wanted) -> dict[str, Any]:
    """Return what a module has, by its source: ``names``, ``values``, ``classes`` and ``functions``.

    What is not there is left out.
    """
    body = [*_top_level(ast.parse(text).body)]
    found = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    top = {node.name: node for node in body if isinstance(node, Function) and not _is_overload(node)}
    read = {}
    for name, kinds in wanted.functions.items():
        owner, _, method = name.rpartition(".")
        node = _methods(found[owner]).get(method) if owner in found else None if owner else top.get(name)
        if node is not None:
            read[name] = _read_function(node, kinds)
    names = {name for node in body for name in _bound(node) if name in wanted.names or not _imports(node)}
    classes = {name: _read_class(found[name], kinds) for name, kinds in wanted.classes.items() if name in found}
    return {
        "names": sorted(names),
        "values": {name: value for name, value in sorted(_literals(body)) if name in wanted.names},
        "classes": dict(sorted(classes.items())),
        "functions": dict(sorted(read.items())),
    }


def _imports(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that bind a module's names, those under ``if`` and ``try`` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _top_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handled = [inner for handler in node.handlers for inner in handler.body]
            yield from _top_level([*node.body, *handled, *node.orelse, *node.finalbody])


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, Function | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    else:
        yield from (target.id for target in _targets(node) if isinstance(target, ast.Name))


def _literals(body: Iterable[ast.stmt]) -> Iterator[tuple[str, Any]]:
    for node in body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str | int | float):
            yield from ((name, value.value) for name in _bound(node))


def _targets(node: ast.stmt) -> Iterator[ast.expr]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def _methods(node: ast.ClassDef) -> dict[str, Function]:
    """Methods and properties by name; of a property the getter, which comes first."""
    methods: dict[str, Function] = {}
    for inner in _top_level(node.body):
        if isinstance(inner, Function) and not _is_overload(inner):
            methods.setdefault(inner.name, inner)
    return methods


def _is_overload(node: Function) -> bool:
    return any((_dotted(one) or "").rpartition(".")[2] == "overload" for one in node.decorator_list)


def _read_class(node: ast.ClassDef, kinds: set[str]) -> dict[str, Any]:
    methods = _methods(node)
    read: dict[str, Any] = {"methods": sorted(methods)}
    if MEMBERS in kinds:
        made = [methods[name] for name in MAKERS if name in methods]
        read["decorators"] = [ast.unparse(one) for one in node.decorator_list]
        read["bases"] = [ast.unparse(base) for base in node.bases]
        read["fields"] = [*_fields(node)]
        read["attributes"] = sorted({name for method in made for name in _assigned(method)})
    followed = sorted(kinds - {MEMBERS})
    return read | ({"asks": {one: sorted({*_asked(node, one)}) for one in followed}} if followed else {})


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Fields with their defaults, and constants with their values."""
    for inner in node.body:
        if isinstance(inner, ast.Assign | ast.AnnAssign):
            value = "" if inner.value is None else f"={_short(inner.value)}"
            yield from (f"{name}{value}" for name in _bound(inner))


def _assigned(method: Function) -> Iterator[str]:
    """Attributes of ``self`` that a method assigns."""
    for node in ast.walk(method):
        for target in _targets(node) if isinstance(node, ast.stmt) else ():
            owner, _, name = (_dotted(target) or "").rpartition(".")
            if owner == "self":
                yield name


def _asked(node: ast.ClassDef, owner: str) -> Iterator[str]:
    """Attributes of ``owner`` that a class reads; not those by `getattr`, which need not be there."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load) and _dotted(inner.value) == owner:
            yield inner.attr


def _read_function(node: Function, kinds: set[str]) -> dict[str, Any]:
    read: dict[str, Any] = {"parameters": _parameters(node)}
    if STEPS in kinds:
        read["steps"] = [step for step, _ in groupby(_steps(node.body))]
    if READS in kinds:
        read["reads"] = sorted(set(_reads(node.body)))
    if TEXTS in kinds:
        texts = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        read["texts"] = sorted(text for text in texts if len(text) <= LONGEST)
    return read


def _parameters(node: Function) -> list[str]:
    """A function's parameters as they are written, without annotations."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    texts = [_parameter(one, value) for one, value in zip(positional, [*defaults, *arguments.defaults], strict=True)]
    if arguments.vararg or arguments.kwonlyargs:
        texts.append(f"*{arguments.vararg.arg if arguments.vararg else ''}")
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    texts += [_parameter(one, value) for one, value in named]
    return [*texts, f"**{arguments.kwarg.arg}"] if arguments.kwarg else texts


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={_short(default)}"


def _short(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _steps(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Calls and assignments in the order in which they happen: what is inside a call, or assigned, comes first."""
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            yield from _steps([node.value] if node.value else [])
            value = _dotted(node.value.func if isinstance(node.value, ast.Call) else node.value)
            if value is not None:
                yield from (f"{_target(target)} = {value}" for target in _targets(node))
        elif isinstance(node, ast.Call):
            yield from _steps(ast.iter_child_nodes(node))
            called = ast.unparse(node.func)
            if len(called) <= LONGEST and called not in COMMON and not called.startswith("logger."):
                yield called
        else:
            yield from _steps(ast.iter_child_nodes(node))


def _target(node: ast.expr) -> str:
    return f"{_target(node.value)}[]" if isinstance(node, ast.Subscript) else ast.unparse(node)


def _reads(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        dotted = _dotted(node)
        if dotted is None:
            yield from _reads(ast.iter_child_nodes(node))
        elif isinstance(getattr(node, "ctx", None), ast.Load):
            yield dotted


def _dotted(node: ast.AST | None) -> str | None:
    """``a.b.c``; None for anything but names and their attributes."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return None
