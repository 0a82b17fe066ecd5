"""What measurements decode: the demo's models, prompts, and how much of a text is worth decoding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness import machine

REPEAT_SPAN = 16
#: A text that repeats itself earlier than this has too few steps to say anything.
MIN_CUT = 24
WARM_UP_TOKENS = 32
#: Of a prompt whose file does not say.
KIND = "code"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DemoModels:
    """Paths of the demo's models, of the file with its prompts, and of that with the benchmarks', of several kinds."""

    target: Path
    draft: Path
    prompts: Path
    bench_prompts: Path


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, the module that it was cut from (its line in the file where that does not say), and where it ends.

    The demo's kinds: ``code``, and inside a ``docstring``, a ``comment`` or a paragraph of ``prose``.
    """

    module: str
    text: str
    kind: str = KIND


WARM_UP = Prompt("warm-up", "import os\nimport sys\n\n\ndef main(argv=None):\n")


def find_models(folder: Path | None) -> DemoModels:
    """Return the demo's models.

    Args:
        folder: Where to look; None looks in ``examples/demo_models`` beside the package.

    Raises:
        ConfigError: Something is missing there; the message says where it was sought.
    """
    root = folder or machine.checkout() / "examples" / "demo_models"
    models = DemoModels(root / "target", root / "draft", root / "prompts.jsonl", root / "bench_prompts.jsonl")
    wanted = [models.target / "config.json", models.draft / "config.json", models.prompts, models.bench_prompts]
    missing = [str(path.relative_to(root)) for path in wanted if not path.is_file()]
    if missing:
        advice = "give a folder that has them with --models DIR, or run the demo in a checkout"
        raise ConfigError(f"demo models: {root} has no {', '.join(missing)}; {advice}")
    return models


def read_prompts(path: Path, count: int | None) -> list[Prompt]:
    """Return ``count`` prompts of a JSON-lines file, or all of them, spread evenly over kinds, then over modules.

    The choice depends on the file alone.  Each kind gives one before any gives two, in turn; of a kind's prompts, each
    module gives one before any gives two.

    Raises:
        ConfigError: The file cannot be read or is malformed, or has fewer prompts than asked for.
    """
    prompts = _parsed(path)
    count = len(prompts) if count is None else count
    if count > len(prompts):
        raise ConfigError(f"--prompts: {count} is more than the {len(prompts)} prompts in {path}")
    kinds: dict[str, dict[str, list[Prompt]]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.kind, {}).setdefault(prompt.module, []).append(prompt)
    sizes = {kind: sum(map(len, modules.values())) for kind, modules in kinds.items()}
    turns = _spread(([kind] * size for kind, size in sizes.items()), count)
    chosen = {kind: iter(_spread(modules.values(), turns.count(kind))) for kind, modules in kinds.items()}
    return [next(chosen[kind]) for kind in turns]


def _spread(groups: Iterable[Sequence[_T]], count: int) -> list[_T]:
    """Take ``count`` items in turns from the groups' beginnings; a round too short for all takes evenly spaced ones."""
    queues = [list(group) for group in groups]
    chosen: list[_T] = []
    while len(chosen) < count:
        queues = [queue for queue in queues if queue]
        wanted = min(count - len(chosen), len(queues))
        chosen += [queues[i * len(queues) // wanted].pop(0) for i in range(wanted)]
    return chosen


def _parsed(path: Path) -> list[Prompt]:
    prompts = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            kind = entry.get("kind", KIND)
            if not isinstance(kind, str) or not kind:
                raise ValueError(kind)
            prompts.append(Prompt(str(entry.get("module", f"line {number}")), str(entry["prompt"]), kind))
        except (ValueError, KeyError, TypeError, AttributeError):
            form = '{"module": …, "prompt": …, "kind": …}'
            raise ConfigError(f"prompts: {path}, line {number}: expected {form}") from None
    return prompts


def repeat_cut(ids: Sequence[int], span: int = REPEAT_SPAN) -> int:
    """Return how many tokens come before the second occurrence of any ``span`` consecutive ones; all if none recurs.

    A small model's greedy text falls into loops, which any drafter predicts: figures from them flatter.
    """
    seen: set[tuple[int, ...]] = set()
    for start in range(len(ids) - span + 1):
        gram = tuple(ids[start : start + span])
        if gram in seen:
            return start
        seen.add(gram)
    return len(ids)
