"""The arguments of `vllm serve`, as far as ours must know them: read, never changed but where a line here says so."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.text import printable

SPECULATION = {
    "--speculative-config": "--specu",
    "--spec-method": "--spec-me",
    "--spec-model": "--spec-mo",
    "--spec-tokens": "--spec-t",
    "-sc": "-sc",
    "--sc": "--sc",  # as the key of a file
}
"""Flags that set speculation, and the shortest that vLLM's parser takes for each."""
ADDITIONAL, SHORTEST_ADDITIONAL = "--additional-config", "--add"
ELSEWHERE = (
    "speculation is set by `wanspec serve` (--speculative-tokens says how many); to set it yourself, use `vllm serve`"
)


@dataclass(frozen=True)
class Arguments:
    """What follows ``vllm serve``: ``line`` word by word, and ``config``, the keys of its ``--config`` file.

    Keys have dashes, as flags have.
    """

    line: tuple[str, ...]
    config: dict[str, Any]

    def give(self, flags: Collection[str]) -> bool:
        """Whether one of these flags is given, on the line or in the file."""
        return any(_flag_name(word) in flags for word in self.line) or any(f"--{key}" in flags for key in self.config)

    def value(self, flag: str, shortest: str) -> str | None:
        """What a flag is given, on the line (the last counts) or else in the file; None where it is not given.

        Args:
            flag: Its whole name.
            shortest: The shortest that vLLM's parser takes for it.
        """
        given = self.config.get(flag.removeprefix("--"))
        for word, following in zip(self.line, (*self.line[1:], ""), strict=True):
            if _abbreviates(_flag_name(word), flag, shortest):
                given = word.partition("=")[2] if "=" in word else following
        return None if given is None else str(given)

    def with_flags(self, *flags: str) -> list[str]:
        """The line with flags of ours, where they part none of its own from its value; the model stays in front."""
        place = 1 if self.line and not _is_flag(self.line[0]) else 0
        return [*self.line[:place], *flags, *self.line[place:]]


def read_arguments(words: Sequence[str]) -> Arguments:
    """Read the arguments; ``--config=FILE`` becomes ``--config FILE``, the one form that vLLM does not overlook.

    Raises:
        ConfigError: The file cannot be read, or there is no model.
    """
    line: list[str] = []
    for word in words:
        line += ["--config", word.removeprefix("--config=")] if word.startswith("--config=") else [word]
    config: dict[str, Any] = {}
    if "--config" in line:
        place = line.index("--config") + 1
        if place == len(line):
            raise ConfigError("--config: names no file; right is --config FILE")
        config = _read_file(line[place])
    if not (config.keys() & {"model", "model-tag"} or _names_model(line)):
        raise ConfigError("no model: name it as for `vllm serve`: MODEL, --model MODEL, or model: in a --config file")
    return Arguments(tuple(line), config)


def refuse_speculation(arguments: Arguments) -> None:
    """Refuse flags and keys that set speculation, in any spelling that vLLM takes.

    Raises:
        ConfigError: There is one.
    """
    for word in arguments.line:
        if _sets_speculation(_flag_name(word)):
            raise ConfigError(f"{re.split('[=.]', word)[0]}: {ELSEWHERE}")
    for key in arguments.config:
        if _sets_speculation(_flag_name(f"--{key}")):
            raise ConfigError(f"--config: {key}: {ELSEWHERE}")


def take_additional(arguments: Arguments) -> tuple[Arguments, dict[str, Any]]:
    """The arguments without ``--additional-config``, and what it gives; where no flag does, what the file gives.

    Raises:
        ConfigError: It is not one JSON object, or sets what `wanspec serve` sets.
    """
    line, found = list[str](), list[Any]()
    words = iter(arguments.line)
    for word in words:
        if not _abbreviates(_flag_name(word), ADDITIONAL, SHORTEST_ADDITIONAL):
            line.append(word)
            continue
        flag, equals, value = word.partition("=")
        found.append(_json_object(None if "." in flag else value if equals else next(words, None)))
    if len(found) > 1:
        raise ConfigError(f"{ADDITIONAL} is given twice; give one JSON object")
    given = found[0] if found else _additional_of_file(arguments.config)
    if "wanspec" in given:
        raise ConfigError(f"{ADDITIONAL}: wanspec is set by --wanspec; leave it out")
    return Arguments(tuple(line), arguments.config), given


def _additional_of_file(config: dict[str, Any]) -> dict[str, Any]:
    keys = [key for key in config if _abbreviates(_flag_name(f"--{key}"), ADDITIONAL, SHORTEST_ADDITIONAL)]
    if not keys:
        return {}
    if len(keys) > 1 or "." in keys[0]:
        # vLLM would have it replace what we give.
        raise ConfigError(f"--config: {printable(keys[0])}: give one mapping additional-config instead")
    value = config[keys[0]]
    try:
        text = json.dumps(value) if isinstance(value, dict) else value
    except (TypeError, ValueError, RecursionError):  # a date, an anchor that holds itself
        text = None
    return _json_object(text)


def _sets_speculation(name: str) -> bool:
    return any(_abbreviates(name, flag, shortest) for flag, shortest in SPECULATION.items())


def _is_flag(word: str) -> bool:
    return word.startswith("-")


def _flag_name(word: str) -> str:
    """A flag without its value and inner keys, with dashes; empty for other words."""
    return re.split("[=.]", word)[0].replace("_", "-") if _is_flag(word) else ""


def _abbreviates(name: str, flag: str, shortest: str) -> bool:
    """Whether vLLM's parser takes ``name`` for ``flag``."""
    return len(name) >= len(shortest) and flag.startswith(name)


def _names_model(line: Sequence[str]) -> bool:
    """Whether a word can be the model: not the value of ``--config``, nor a number or JSON after a flag."""
    before = ""
    for word in line:
        if _flag_name(word) == "--model":
            return True
        is_value = _is_flag(before) and "=" not in before
        if not _is_flag(word) and before != "--config" and not (is_value and _is_plain_value(word)):
            return True
        before = word
    return False


def _is_plain_value(word: str) -> bool:
    try:
        json.loads(word)
    except (ValueError, RecursionError):
        return False
    return True


def _json_object(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{ADDITIONAL}: must be one JSON object here, such as '{{\"key\": 1}}'")
    return value


def _read_file(path: str) -> dict[str, Any]:
    shown = printable(path, 1000)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"--config: {shown}: is not valid YAML{where}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # PyYAML's own, without a line
        raise ConfigError(
            f"--config: {shown}: is not valid YAML: it holds a date, a number or an escape that is none, "
            "or is nested too deep"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"--config: {shown}: must be a mapping of flags to values, as in model: NAME")
    return {str(key).replace("_", "-"): value for key, value in data.items()}
