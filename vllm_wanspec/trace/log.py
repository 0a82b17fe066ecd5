"""Event logs: JSON lines that each process writes about its sessions, read one by one and put on one clock.

Every field that is used later is checked here, where its file and line are known. What the events mean together is
`timeline`'s matter.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from vllm_wanspec.errors import ConfigError

VERSION = 1
SIDES = ("controller", "drafter")
OPEN, COMMIT, NODES, CLOSE, REJECT = 4, 5, 6, 7, 8
"""Types of wire messages, the first item of each."""
REPORT_BYTES = 1 << 20
_MAX_COUNT = 2**53
_HEADER_START = b'{"wanspec_events"'
_EXPECTED_HEADER = 'a header, {"wanspec_events": 1, "side": "controller" or "drafter", "name", "wall_s", "at_s"}'

Check = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Event:
    """One call of a session.

    Attributes:
        at_s: When, on the wall clock.
        side: ``controller`` or ``drafter``.
        process: Name of the process.
        key: The session: the request's id at the controller, the peer's key at the drafter.
        call: What was called.
        data: Its inputs, and its outputs under ``out``.
    """

    at_s: float
    side: str
    process: str
    key: str
    call: str
    data: Mapping[str, Any]


def read_events(path: Path, progress: Callable[[int], None] | None = None) -> Iterator[Event]:
    """The events of one file in their order; calls that are not known are left out.

    Args:
        path: The event log.
        progress: Told now and then how many more bytes have been read.

    Raises:
        ConfigError: The file cannot be read, or a line other than a truncated last one is broken.
    """
    side = process = ""
    offset_s = 0.0
    number, reported = 0, 0
    for number, line in enumerate(_lines(path), 1):
        reported += len(line)
        if progress is not None and reported >= REPORT_BYTES:
            progress(reported)
            reported = 0
        record = _parse(path, number, line)
        if record is None:
            break
        if "wanspec_events" in record:
            side, process, offset_s = _header(path, number, record)
        elif not side:
            raise _broken(path, number, _EXPECTED_HEADER)
        else:
            event = _event(path, number, record, (side, process, offset_s))
            if event is not None:
                yield event
    if progress is not None:
        progress(reported)
    if not side:
        raise _broken(path, max(number, 1), _EXPECTED_HEADER)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any] | None:
    """The line's object; None for a last line that was cut off."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        # A process that was killed in mid-line has restarted: its header follows without a line end.
        restart = line.find(_HEADER_START, 1)
        if restart > 0:
            return _parse(path, number, line[restart:])
        if not line.endswith(b"\n"):
            return None
        record = None
    if not isinstance(record, dict):
        raise _broken(path, number, "a JSON object")
    return record


def _header(path: Path, number: int, record: Mapping[str, Any]) -> tuple[str, str, float]:
    version, side, name = record["wanspec_events"], record.get("side"), record.get("name")
    if version != VERSION:
        raise ConfigError(f"{path}, line {number}: event log of version {version!r:.20}; this program reads {VERSION}")
    if (
        side not in SIDES
        or not isinstance(name, str)
        or not all(_number(record.get(key)) for key in ("wall_s", "at_s"))
    ):
        raise _broken(path, number, _EXPECTED_HEADER)
    return side, name, record["wall_s"] - record["at_s"]


def _event(path: Path, number: int, record: Mapping[str, Any], header: tuple[str, str, float]) -> Event | None:
    side, process, offset_s = header
    at_s, key, call = record.get("t"), record.get("k"), record.get("call")
    if not (_number(at_s) and isinstance(key, str) and isinstance(call, str)):
        raise _broken(path, number, 'an event, {"t": seconds, "k": session, "call": name, ...}')
    fields = _FIELDS[side].get(call)
    if fields is None:
        return None
    for name, (check, expected) in fields.items():
        if not check(record.get(name)):
            raise _broken(path, number, f'{expected} as "{name}" of {call}')
    out = record.get("out", [])
    check, expected = (
        (_tokens, "a list of token ids") if call in DRAFTS else (_outputs, "a list of messages or actions")
    )
    if not check(out):
        raise _broken(path, number, f'{expected} as "out" of {call}')
    return Event(record["t"] + offset_s, side, process, key, call, record)


def _broken(path: Path, number: int, expected: str) -> ConfigError:
    return ConfigError(f"{path}, line {number}: expected {expected}")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15 and isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_count, value))


def _steps(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(step, list) and len(step) >= 3 and _count(step[0]) for step in value
    )


def _nodes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(node, list)
        and len(node) >= 5
        and all(map(_count, node[:3]))
        and node[1] < node[0]
        and _number(node[3])
        and _number(node[4])
        for node in value
    )


def _limits(value: Any) -> bool:
    return isinstance(value, list)


_MESSAGES: dict[int, tuple[Check, ...]] = {
    OPEN: (_count, _tokens, _limits, _count),
    COMMIT: (_count, _count, _tokens),
    NODES: (_count, _count, _nodes),
    CLOSE: (_count,),
    REJECT: (_count, _text),
}
_ACTIONS: dict[str, tuple[Check, ...]] = {"start": (_count, _count, _count, _count), "stop": (_count,)}


def _message(value: Any, kinds: tuple[int, ...] = ()) -> bool:
    """Whether a value is a wire message or an action; one of ``kinds`` if any are given. New ones pass unread."""
    if not isinstance(value, list) or not value or type(value[0]) not in (int, str):
        return False
    if kinds and value[0] not in kinds:
        return False
    checks = _MESSAGES.get(value[0]) if type(value[0]) is int else _ACTIONS.get(value[0])
    fields = value[1:]
    return checks is None or (
        len(fields) >= len(checks) and all(check(field) for check, field in zip(checks, fields, strict=False))
    )


def _outputs(value: Any) -> bool:
    return isinstance(value, list) and all(_message(item) for item in value)


def _one_of(*kinds: int) -> Check:
    return lambda value: _message(value, kinds)


Field = tuple[Check, str]
_TOKENS = (_tokens, "a list of token ids")
_TEXT = (_text, "a text")
_MAYBE_TEXT: Field = (lambda value: value is None or isinstance(value, str), "a text")
_COUNT = (_count, "a number from 0")
_BRANCH: dict[str, Field] = {"branch": _COUNT}
DRAFTS = frozenset({"draft", "fall_back", "told"})
"""Calls that give out the tokens of a draft; others give out messages."""
_FIELDS: dict[str, dict[str, dict[str, Field]]] = {
    "controller": {
        "begin": {"context": _TOKENS},
        "link": {"drafter": _TEXT, "peer": _TEXT},
        "open": {"drafter": _MAYBE_TEXT, "peer": _MAYBE_TEXT},
        "commit": {"tokens": _TOKENS},
        "receive": {"message": (_one_of(NODES, REJECT), "a nodes or reject message")},
        "draft": {"limit": _COUNT},
        "fall_back": {"limit": _COUNT},
        "told": {"looked_up": _COUNT},
        "wait": {"waited_s": (lambda value: _number(value) and value >= 0, "seconds from 0")},
        "leave": {},
        "link_lost": {},
        "close": {},
    },
    "drafter": {
        "open": {"message": (_one_of(OPEN), "an open message")},
        "commit": {"message": (_one_of(COMMIT), "a commit message")},
        "drafted": {**_BRANCH, "steps": (_steps, "a list of [token, logprob, entropy, ...]")},
        "wanted": {"tokens": _COUNT},
        "ended": _BRANCH,
        "failed": {},
        "resize": {},
        "close": {},
    },
}
"""What each known call must have, and how to say it."""
