"""Prompts of four kinds for the benchmarks, from text that the pair was not trained on.

What a model goes on with depends on where it begins: code repeats its own names and phrases, running English less. A
prompt of kind "code" ends where a function's body begins (as those of ``prompts.jsonl``), "docstring" inside a
docstring's running text, "comment" inside a block of comment lines, and "prose" inside a paragraph of English.

Code, docstrings and comments come from the held-out modules. Prose comes from texts of the library that are no
modules (``PROSE_FILES``) and from the topics of ``pydoc_data``, the language reference: the corpus has neither. What
the corpus also has, word for word, is left out.
"""

from __future__ import annotations

import ast
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics

import data
import numpy as np

EACH = 48  # prompts of each kind
MIN_TOKENS = 100  # so that all kinds are about as long as code; at most data.PROMPT_MAX_TOKENS
KNOWN_RUN = 32  # tokens; a prompt shares no such run with the training text or with another prompt
PROSE_FILES = ("LICENSE.txt", "email/architecture.rst", "idlelib/extend.txt")
TOPICS = "pydoc_data.topics"
SHORTEST_LINE = 5  # words of a line of running text
PLAIN_SHARE = 0.8  # of its words, at least so many are ordinary ones
MARKER = re.compile(r"""\s*(#+:?|[rR]?\"{3}|[rR]?'{3})?\s*""")  # what a comment or a docstring begins with
COLUMNS = re.compile(r"\S {3,}\S")  # of a table
PLAIN_WORD = re.compile(r"""[(\["'`*“‘]*[A-Za-z][a-z'’-]*[)\]"'`*”’.,;:?!]*""")


@dataclass(frozen=True)
class Place:
    """Where a prompt may end, and where it may begin: lines of a text, counted from 1."""

    end: int
    starts: tuple[int, ...]


def _is_plain(line: str, least: int = SHORTEST_LINE) -> bool:
    """Whether a line has at least ``least`` words and is English rather than code, a list, a table or a footnote."""
    content = line[MARKER.match(line).end() :]
    words = content.split()
    if len(words) < least or words[0][0] in "*->?[" or COLUMNS.search(content):
        return False
    return sum(PLAIN_WORD.fullmatch(word) is not None for word in words) >= PLAIN_SHARE * len(words)


def _inside(lines: list[str], first: int, last: int) -> list[int]:
    """Lines of ``first`` to ``last`` that stand in running text: the one before is such a line, the next goes on."""
    return [
        n
        for n in range(first + 1, last)
        if _is_plain(lines[n - 2]) and _is_plain(lines[n - 1]) and _is_plain(lines[n], 1)
    ]


def _docstring_places(source: str) -> list[Place]:
    """Places inside docstrings; prompts begin at natural starts, or at what the docstring documents."""
    tree, lines = ast.parse(source), source.splitlines()
    natural, places = data.natural_starts(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) or ast.get_docstring(node) is None:
            continue
        own = 1 if isinstance(node, ast.Module) else data.start_line(node)
        starts = tuple(sorted({own, *(start for start in natural if start < own)}))
        text = node.body[0]
        places += [Place(n, starts) for n in _inside(lines, text.lineno, text.end_lineno)]
    return places


def _comment_lines(text: str) -> list[int]:
    """Numbers of the lines that are nothing but a comment."""
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return [t.start[0] for t in found if t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip()]


def _comment_places(source: str) -> list[Place]:
    """Places inside blocks of comment lines; prompts begin at a statement before, or with the block."""
    tree, lines = ast.parse(source), source.splitlines()
    statements = {data.start_line(node) for node in ast.walk(tree) if isinstance(node, ast.stmt)}
    places = []
    for _, block in groupby(enumerate(_comment_lines(source)), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in block]
        starts = tuple(sorted({numbers[0], *(start for start in statements if start < numbers[0])}))
        places += [Place(n, starts) for n in _inside(lines, numbers[0], numbers[-1])]
    return places


def _paragraphs(lines: list[str]) -> list[tuple[int, int]]:
    """First and last line of each run of lines that are not blank."""
    runs = groupby(range(1, len(lines) + 1), lambda n: bool(lines[n - 1].strip()))
    numbers = [list(run) for filled, run in runs if filled]
    return [(run[0], run[-1]) for run in numbers]


def _prose_places(text: str, seen: set[tuple[str, ...]]) -> list[Place]:
    """Places inside paragraphs; prompts begin with a paragraph and have nothing but running text.

    ``seen`` holds the paragraphs of earlier texts, which are left out, and gets this one's: topics quote each other.
    """
    lines, places, starts = text.splitlines(), [], []
    for first, last in _paragraphs(lines):
        content = tuple(line.strip() for line in lines[first - 1 : last])
        if content in seen or not all(_is_plain(line) for line in content[:-1]) or not _is_plain(content[-1], 1):
            starts = []
        else:
            starts.append(first)
            places += [Place(n, tuple(starts)) for n in _inside(lines, first, last)]
        seen.add(content)
    return places


def _cut_line(line: str, rng: np.random.Generator) -> str:
    """The line up to the end of one of its words, neither the first nor the last."""
    ends = [word.end() for word in re.finditer(r"\S+", line)][1:-1]
    return line[: ends[int(rng.integers(len(ends)))]]


def _runs(ids: np.ndarray) -> set[int]:
    """Hashes of all runs of ``KNOWN_RUN`` ids in ``ids`` [tokens], uint16."""
    raw, size = ids.tobytes(), KNOWN_RUN * ids.itemsize
    return {hash(raw[i : i + size]) for i in range(0, len(raw) - size + 1, ids.itemsize)}


class Fresh:
    """Tells which prompts are new: they share no run with the training text or with a prompt that was taken."""

    def __init__(self, tokenizer: data.Tokenizer, training: np.ndarray) -> None:
        """``training``: the training tokens [tokens], uint16."""
        self._tokenizer = tokenizer
        self._known = _runs(training)

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.uint16)

    def suits(self, text: str) -> bool:
        """Whether a text is new and as long as a prompt should be."""
        if len(text) > data.PROMPT_MAX_CHARACTERS:
            return False
        ids = self._ids(text)
        return MIN_TOKENS <= len(ids) <= data.PROMPT_MAX_TOKENS and self._known.isdisjoint(_runs(ids))

    def take(self, text: str) -> str:
        """Count a text among the known, and return it."""
        self._known |= _runs(self._ids(text))
        return text


def _code(prompts: list[str], fresh: Fresh) -> Iterator[str]:
    """Those of a module's prompts that are new when their turn comes and do not happen to end with a comment."""
    for prompt in prompts:
        if not prompt.splitlines()[-1].lstrip().startswith("#") and fresh.suits(prompt):
            yield fresh.take(prompt)


def _english(text: str, places: list[Place], fresh: Fresh, rng: np.random.Generator) -> Iterator[str]:
    """Prompts of one text that are new when their turn comes; places and beginnings in random order."""
    lines = text.splitlines()
    for place in (places[i] for i in rng.permutation(len(places))):
        last = _cut_line(lines[place.end - 1], rng)
        texts = ["\n".join([*lines[start - 1 : place.end - 1], last]) for start in place.starts]
        fitting = [text for text in texts if fresh.suits(text)]
        if fitting:
            yield fresh.take(fitting[int(rng.integers(len(fitting)))])


def _prose_texts() -> dict[str, str]:
    """The texts that prose is taken from, by the name that a prompt gets for its module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {name: (root / name).read_text(encoding="utf-8") for name in PROSE_FILES}
    return files | {f"{TOPICS}:{name}": topics[name] for name in sorted(topics)}


def _in_turns(kind: str, offers: dict[str, Iterator[str]]) -> list[dict[str, str]]:
    """``EACH`` records of a kind; each text gives one before any gives two."""
    records: list[dict[str, str]] = []
    while len(records) < EACH:
        before = len(records)
        for name, prompts in offers.items():
            prompt = next(prompts, None) if len(records) < EACH else None
            if prompt is not None:
                records.append({"module": name, "kind": kind, "prompt": prompt})
        if len(records) == before:
            raise data.DataError(f"the text offers only {before} prompts that end in {kind}, {EACH} are wanted")
    return records


def make_bench_prompts(
    modules: list[data.Module], tokenizer: data.Tokenizer, training: np.ndarray, seed: int
) -> list[dict[str, str]]:
    """``EACH`` records {"module", "kind", "prompt"} of every kind, as evenly spread over their texts as they allow.

    ``modules``: the held-out ones; ``training``: the training tokens [tokens], uint16. Code is of the prompts that
    ``make_prompts`` chooses from for the same seed.
    """
    fresh, rng = Fresh(tokenizer, training), np.random.default_rng(seed)
    records = _in_turns("code", {m.name: _code(data.module_prompts(m, tokenizer, rng), fresh) for m in modules})
    seen: set[tuple[str, ...]] = set()
    places = {  # comments are the rarest, and choose first
        "comment": {module.name: (module.text, _comment_places(module.text)) for module in modules},
        "docstring": {module.name: (module.text, _docstring_places(module.text)) for module in modules},
        "prose": {name: (text, _prose_places(text, seen)) for name, text in _prose_texts().items()},
    }
    for kind, texts in places.items():
        rng = np.random.default_rng(seed)
        records += _in_turns(kind, {name: _english(text, at, fresh, rng) for name, (text, at) in texts.items()})
    return records
