"""What is needed of vLLM: the contract's entries, and how what is there is held against them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

NEAREST = 5
Record = Mapping[str, Any]
"""What `reading.read_module` returns, or a part of it."""


class ContractError(Exception):
    """A file of the contract is wrong; one line."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """One thing that must be there.

    Attributes:
        module: Where.
        name: What: ``function``, ``Class``, ``Class.method`` or a name that the module imports or binds.
        by: Which part of this project needs it, and how: "wrapped", "called", "read".
        why: What for.
        versions: Versions that have it to have, such as "0.32"; empty: all.
        gone: Versions that must not have it: what was built for its sake would have to go, too.
        begins: A function's first parameters, each with its default where that counts.
        takes: Parameters that a function must have anywhere.
        called: Whether we call the function: then all further parameters must have defaults.
        has: What an instance of a class must have: fields, attributes that ``__init__`` assigns, properties, methods.
        bases: What a class must be derived from, as its source says it.
        open: Whether instances of a class must take attributes that it does not know.
        asks: Something of a class's own, such as ``self.speculator``, that we put there in place of vLLM's ...
        only: ... and all that the class may ask of it.
        order: Steps of a function (see `reading`), in this order.
        reads: What a function must read.
        says: Texts that must stand in a function, whole.
        value: What a module's name must be bound to.
    """

    module: str
    name: str
    by: str
    why: str
    versions: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    called: bool = False
    has: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    open: bool = False
    asks: str = ""
    only: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    value: str | int | None = None

    @property
    def seam(self) -> str:
        """Its whole name."""
        return f"{self.module}.{self.name}"

    @property
    def is_function(self) -> bool:
        """Whether it needs more of a function than that it is there."""
        return bool(self.begins or self.takes or self.called or self.order or self.reads or self.says)

    @property
    def is_of_members(self) -> bool:
        """Whether it needs more of a class than that it is there."""
        return bool(self.has or self.bases or self.open)

    @property
    def class_name(self) -> str | None:
        """The class whose record this needs; None where it needs none."""
        owner = self.name.rpartition(".")[0]
        return owner or (self.name if self.is_of_members or self.asks else None)

    def concerns(self, version: str) -> bool:
        """Whether vLLM of a version must have it."""
        return not self.versions or _is_one_of(version, self.versions)

    def is_gone(self, version: str) -> bool:
        """Whether vLLM of a version must not have it."""
        return _is_one_of(version, self.gone)


def _is_one_of(version: str, series: Iterable[str]) -> bool:
    return any(f"{version}.".startswith(f"{one}.") for one in series)


def read_contract(folder: Path) -> list[Need]:
    """Return the entries of all YAML files of a folder.

    Raises:
        ContractError: One of them is not a list of entries; or two entries of one part are about the same thing.
    """
    needs = [need for path in sorted(folder.glob("*.yaml")) for need in _read_file(path)]
    if not needs:
        raise ContractError(f"{folder}: no contract in it")
    seen: set[tuple[str, str, tuple[str, ...]]] = set()
    for need in needs:
        key = (need.seam, need.by, need.versions)
        if key in seen:
            raise ContractError(f"{need.seam}: two entries for {need.by}")
        seen.add(key)
    return needs


def _read_file(path: Path) -> Iterator[Need]:
    lists = {one.name for one in fields(Need) if one.default == ()}
    modules = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(modules, dict):
        raise ContractError(f"{path.name}: expected modules, each with a list of entries")
    for module, entries in modules.items():
        for entry in entries:
            values: dict[str, Any] = {
                key: tuple(map(str, value)) if key in lists else value for key, value in entry.items()
            }
            try:
                need = Need(module=module, **values)
            except TypeError as error:
                raise ContractError(f"{path.name}: {module}.{entry.get('name')}: {error}") from error
            if any(isinstance(entry.get(key), str) for key in lists):
                raise ContractError(f"{path.name}: {need.seam}: a text where a list belongs")
            yield need


def differences(needs: Iterable[Need], version: str, modules: Mapping[str, Record]) -> list[str]:
    """Return what a version of vLLM lacks, a paragraph each; empty where the contract holds.

    Args:
        needs: The contract.
        version: vLLM's.
        modules: What was read of it, by module.
    """
    found = []
    for need in needs:
        lacks = [*lacking(need, modules.get(need.module))]
        if need.is_gone(version) and not lacks:
            lacks = [("that it has gone", "it is there: what was built for its sake can go, or the entry is wrong")]
        elif not need.concerns(version):
            continue
        head = f"vLLM {version}: {need.seam}\n  for {need.by}: {need.why}"
        found += [f"{head}\n  needed:   {needed}\n  there is: {there}" for needed, there in lacks]
    return found


def lacking(need: Need, module: Record | None) -> Iterator[tuple[str, str]]:
    """Yield what is needed and not there, each with what is there instead."""
    if module is None:
        yield "the module", "no such module"
        return
    owner, _, name = need.name.rpartition(".")
    names = module["classes"].get(owner, {}).get("methods", []) if owner else module["names"]
    if owner and owner not in module["classes"]:
        yield f"class {owner}", f"no such class; {nearest(owner, module['names'])}"
    elif name not in names:
        yield f"{'method ' if owner else ''}{name}", f"no such name; {nearest(name, names)}"
    elif need.is_function and need.name not in module["functions"]:
        yield f"function {name}", "a name that is not bound by a def statement"
    elif need.class_name == need.name and need.name not in module["classes"]:
        yield f"class {name}", "a name that is not bound by a class statement"
    else:
        yield from _lacking_value(need, module)
        yield from _lacking_members(need, module)
        if need.is_function:
            function = module["functions"][need.name]
            yield from _lacking_parameters(need, function["parameters"])
            yield from _lacking_steps(need, function.get("steps", []))
            yield from _lacking_reads(need, function.get("reads", []))
            unsaid = [one for one in need.says if one not in function.get("texts", [])]
            if unsaid:
                yield f"it says {unsaid[0]!r}", nearest(unsaid[0], function.get("texts", []))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return what comes close to a name that is missing."""
    near = difflib.get_close_matches(name, list(names), NEAREST, 0.4)
    return f"nearest: {', '.join(near)}" if near else "nothing that resembles it"


def _lacking_value(need: Need, module: Record) -> Iterator[tuple[str, str]]:
    if need.value is not None and module["values"].get(need.name) != need.value:
        yield f"the value {need.value!r}", repr(module["values"].get(need.name))


def _lacking_members(need: Need, module: Record) -> Iterator[tuple[str, str]]:
    if need.class_name != need.name:
        return
    found = module["classes"][need.name]
    fields = found.get("fields", [])
    known = {*(one.partition("=")[0] for one in fields), *found.get("attributes", []), *found["methods"]}
    # Where a default counts, it is the whole text of the field.
    for one in need.has:
        if one not in known and one not in fields:
            yield f"{need.name}.{one}", nearest(one, [*known, *(field for field in fields if "=" in field)])
    bases = found.get("bases", [])
    if not {*need.bases} <= {*bases}:
        yield f"derived from {', '.join(need.bases)}", f"derived from {', '.join(bases) or 'nothing'}"
    closed = [one for one in (*found.get("decorators", []), *fields) if "slots=True" in one or "__slots__" in one]
    if need.open and closed:
        yield "instances that take further attributes", ", ".join(closed)
    asked = found.get("asks", {}).get(need.asks, [])
    if not {*asked} <= {*need.only}:
        more = ", ".join(one for one in asked if one not in need.only)
        yield f"nothing asked of {need.asks} but {', '.join(need.only)}", f"{more} too"


def _lacking_parameters(need: Need, parameters: Sequence[str]) -> Iterator[tuple[str, str]]:
    there = f"({', '.join(parameters)})"
    names = [one.partition("=")[0] for one in parameters]
    begin = zip(need.begins, [*parameters, *[""] * len(need.begins)], strict=False)
    if any(one not in (other, other.partition("=")[0]) for one, other in begin):
        yield f"parameters that begin with ({', '.join(need.begins)})", there
    missing = [one for one in need.takes if one not in (names if "=" not in one else parameters)]
    if missing:
        yield f"parameters {', '.join(missing)}", there
    if need.called:
        known = {one.partition("=")[0] for one in (*need.begins, *need.takes)}
        wanted = [one for one in parameters if one not in known and not one.startswith("*") and "=" not in one]
        if wanted:
            yield f"no argument beside {', '.join(need.begins + need.takes)}", f"{there}: {', '.join(wanted)} too"


def _lacking_steps(need: Need, steps: Sequence[str]) -> Iterator[tuple[str, str]]:
    missing = [one for one in need.order if one not in steps]
    if missing:
        yield f"it does {', '.join(missing)}", nearest(missing[0], steps)
        return
    place = 0
    for step in need.order:
        if step not in steps[place:]:
            mentioned = [one for one in steps if one in need.order]
            yield f"in this order: {', '.join(need.order)}", ", ".join(mentioned)
            return
        place = steps.index(step, place) + 1


def _lacking_reads(need: Need, reads: Sequence[str]) -> Iterator[tuple[str, str]]:
    missing = [one for one in need.reads if not any(f"{other}.".startswith(f"{one}.") for other in reads)]
    if missing:
        yield f"it reads {', '.join(missing)}", nearest(missing[0], reads)
