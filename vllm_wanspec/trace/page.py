"""The page about one request: its timeline and its tree as data, put into the template.

The page is one file that needs nothing else, so that it can be mailed and opened anywhere.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.trace.drafting import SessionReplay
from vllm_wanspec.trace.layout import UNDRAFTED, Place, lay_out
from vllm_wanspec.trace.target import Step
from vllm_wanspec.trace.timeline import Timeline
from vllm_wanspec.trace.tree import Fate

CODE = ("page.js", "page_time.js", "page_tree.js", "page_point.js")
FATES = [*(fate.value for fate in Fate), UNDRAFTED]

Ms = Callable[[float | None], float | None]


def write_page(path: Path, timeline: Timeline, texts: Mapping[int, str] | None = None) -> None:
    """Write the page.

    Args:
        path: Where to.
        timeline: What it shows.
        texts: Of token ids; ids without one are shown as numbers.

    Raises:
        ConfigError: The file cannot be written.
    """
    write_text(path, render(page_data(timeline, texts or {})))


def write_text(path: Path, text: str) -> None:
    """Write a file; ConfigError says why it cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def render(data: Mapping[str, Any]) -> str:
    """The page with data in it, such that no text in the data can end its element."""
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = _part("page.html")
    code = "\n".join(map(_part, CODE))
    for mark, text in (("/*STYLE*/", _part("page.css")), ("/*CODE*/", code), ("/*DATA*/", embedded)):
        before, found, after = page.partition(mark)
        assert found, mark
        page = before + text + after
    return page


@cache
def _part(name: str) -> str:
    return (files("vllm_wanspec.trace") / name).read_text("utf-8")


def token_texts(folder: Path, tokens: Iterable[int]) -> dict[int, str]:
    """Texts of token ids by the folder's ``tokenizer.json``, with blanks made visible.

    Raises:
        ConfigError: There is no such tokenizer, or nothing to read it with.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(
            "--tokenizer: needs the package tokenizers (pip install tokenizers); or leave it out"
        ) from None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"--tokenizer: there is no {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"--tokenizer: {path} is not a tokenizer: {' '.join(str(error).split())[:200]}") from None
    texts = {}
    for token in set(tokens):
        if tokenizer.id_to_token(token) is not None if token < 2**32 else False:
            text = tokenizer.decode([token], skip_special_tokens=False)
            texts[token] = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or str(token)
    return texts


def tokens_of(timeline: Timeline) -> set[int]:
    """Every token id that the page shows."""
    target = timeline.target
    return {
        *(node.token for node in target.nodes),
        *(token for step in target.steps for token in (*step.tokens, *step.drafted)),
    }


def page_data(timeline: Timeline, texts: Mapping[int, str]) -> dict[str, Any]:
    """What the page shows; times are milliseconds since the request began."""
    target = timeline.target
    start_s = target.start_s

    def ms(at_s: float | None) -> float | None:
        return None if at_s is None else round(1e3 * (at_s - start_s), 3)

    places = lay_out(target)
    index = {id(place.node): number for number, place in enumerate(places) if place.node is not None}
    up, down = timeline.delays_s()
    return {
        "figures": target.figures.as_dict(),
        "context": target.context_length,
        "end": ms(timeline.end_s),
        "delays": {"up": _median_ms(up), "down": _median_ms(down)},
        "shifts": [round(1e3 * shift_s, 3) for shift_s in timeline.clock_shift_s.values()],
        "passes": sum(session.passes for session in timeline.sessions) if timeline.sessions else None,
        "fates": target.count_fates(),
        "names": FATES,
        "texts": {str(token): text for token, text in texts.items()},
        "steps": [_step(step, ms, index) for step in target.steps],
        "arrivals": [
            [ms(a.at_s), a.nodes, a.added, a.stale, a.late, a.bytes, ms(a.sent_s), a.live_nodes]
            for a in target.arrivals
        ],
        "waits": [[ms(wait.start_s), ms(wait.end_s)] for wait in target.waits],
        "links": [[ms(link.start_s), ms(link.end_s), link.drafter, link.ending] for link in target.links],
        "sessions": [_session(session, ms) for session in timeline.sessions],
        "tree": _tree(places, ms),
    }


def _median_ms(delays_s: list[float]) -> float | None:
    return round(1e3 * sorted(delays_s)[len(delays_s) // 2], 3) if delays_s else None


def _step(step: Step, ms: Ms, index: Mapping[int, int]) -> dict[str, Any]:
    return {
        "start": ms(step.start_s),
        "end": ms(step.end_s),
        "position": step.position,
        "had": step.had,
        "outcome": step.outcome,
        "drafted": step.drafted,
        "limit": step.limit,
        "tokens": step.tokens,
        "accepted": step.accepted,
        "waited": round(1e3 * step.waited_s, 3),
        "live": step.live_nodes,
        "received": ms(step.received_s),
        "draft": [index[id(node)] for node in step.draft_nodes if id(node) in index],
    }


def _session(session: SessionReplay, ms: Ms) -> dict[str, Any]:
    return {
        "drafter": session.process,
        "peer": session.key,
        "start": ms(session.start_s),
        "end": ms(session.end_s),
        "commits": [
            [ms(receipt.at_s), receipt.position, receipt.tokens, receipt.opening] for receipt in session.receipts
        ],
        "rejects": [[ms(rejection.at_s), rejection.code] for rejection in session.rejections],
        "branches": [
            {
                "number": branch.number,
                "start": ms(branch.start_s),
                "end": ms(branch.end_s),
                "promoted": ms(branch.promoted_s),
                "main": branch.main,
                "lane": branch.lane,
                "node": branch.node,
                "tokens": branch.tokens,
                "ending": branch.ending,
            }
            for branch in session.branches
        ],
    }


def _tree(places: list[Place], ms: Ms) -> dict[str, list[Any]]:
    """By columns, which is much shorter than by nodes."""
    nodes = [place.node for place in places]
    return {
        "column": [place.column for place in places],
        "row": [place.row for place in places],
        "above": [place.above for place in places],
        "token": [place.token for place in places],
        "fate": [FATES.index(place.fate) for place in places],
        "step": [place.step for place in places],
        "id": [None if node is None else node.id for node in nodes],
        "logprob": [None if node is None else round(node.logprob, 4) for node in nodes],
        "entropy": [None if node is None else round(node.entropy_nats, 4) for node in nodes],
        "arrived": [None if node is None else ms(node.arrived_s) for node in nodes],
    }
