"""Event logs to test with: a short pair written by hand, of which every fact is known, and longer made-up ones."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from vllm_wanspec.trace.tree import TreeCopy

WALL_S = 1000.0
CONTROLLER_S = 100.0
DRAFTER_S = 500.0
"""The three clocks at the same moment."""
PEER = "ab#7"

Line = dict[str, Any]


def header(side: str, at_s: float, wall_s: float = WALL_S) -> Line:
    return {"wanspec_events": 1, "side": side, "name": f"the {side}", "wall_s": wall_s, "at_s": at_s}


def call(ms: float, key: str, name: str, start_s: float = CONTROLLER_S, **data: Any) -> Line:
    return {"t": start_s + ms / 1e3, "k": key, "call": name, **data}


def write(path: Path, lines: Iterable[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def at_controller(key: str = "req-a") -> list[Line]:
    """A request with a caught miss, a miss, a late draft that a wait was worth, a lost link and a reject."""

    def does(ms: float, name: str, **data: Any) -> Line:
        return call(ms, key, name, **data)

    def gets(ms: float, *nodes: list[Any], seen: int = 3) -> Line:
        return does(ms, "receive", message=[6, 7, seen, list(nodes)], out=[])

    def takes(ms: float, *tokens: int) -> Line:
        return does(ms, "draft", limit=2, least=0.1, out=list(tokens))

    def commits(ms: float, position: int, *tokens: int, session: int | None = 7) -> Line:
        out = [] if session is None else [[5, session, position, list(tokens)]]
        return does(ms, "commit", tokens=list(tokens), out=out)

    context = [1, 2, 3, 10, 12, 20, 21, 30, 40, 42, 43, 44]
    limits = [[16, 64, 4, 4, 8, 1.0, 0.05, 1], 0, 0.0, 0, None]
    return [
        does(0, "begin", context=[1, 2, 3]),
        does(0, "link", drafter="west", peer=PEER),
        does(0, "open", vocab_size=100, out=[[4, 7, [1, 2, 3], *limits]]),
        gets(25, [1, 0, 10, -0.1, 0.4]),
        gets(30, [2, 1, 11, -0.7, 1.5], [3, 1, 12, -1.2, 1.5]),
        gets(35, [4, 2, 13, -0.2, 0.6], [5, 3, 20, -0.3, 0.8]),
        gets(36, [6, 4, 14, -0.2, 0.5], [7, 5, 21, -0.1, 0.3]),
        commits(40, 3, 10),
        takes(40, 11),
        takes(41, 11, 13),
        commits(80, 4, 12),
        takes(80, 20),
        takes(81, 20, 21),
        gets(105, [8, 7, 31, -0.9, 1.6], [9, 7, 32, -1.3, 1.6], seen=5),
        gets(106, [10, 8, 33, -0.2, 0.4], seen=5),
        commits(121, 5, 20, 21, 30),
        takes(122),
        gets(135, [11, 10, 34, -0.2, 0.4], seen=5),
        commits(161, 8, 40),
        takes(162),
        gets(165, [13, 12, 40, -0.5, 1.1], [14, 12, 41, -1.1, 1.1], seen=8),
        gets(166, [15, 13, 42, -0.1, 0.2], seen=8),
        does(168, "wait", waited_s=0.006),
        takes(168, 42),
        commits(210, 9, 42, 43),
        does(215, "link_lost"),
        takes(216),
        commits(250, 11, 44, session=None),
        does(255, "open", drafter="east", peer="cd#1", out=[[4, 1, context, *limits]]),
        takes(256),
        commits(290, 12, 45, session=1),
        takes(291),
        commits(330, 13, 46, session=1),
        does(340, "receive", message=[8, 1, "overloaded"], out=[]),
        does(341, "unheard_of", whatever=5),
        does(342, "close", out=[]),
    ]  # fmt: skip


def at_drafter() -> list[Line]:
    """The first session of `at_controller`, 10 ms away: a main line, a branch that becomes it, another main line."""

    def does(ms: float, name: str, **data: Any) -> Line:
        return call(ms, PEER, name, DRAFTER_S, **data)

    def drafted(
        ms: float, branch: int, token: int, *nodes: list[Any], then: tuple[Any, ...] = (), seen: int = 3
    ) -> Line:
        step = [token, nodes[0][3], nodes[0][4], [[node[2], node[3]] for node in nodes[1:]]]
        return does(ms, "drafted", branch=branch, steps=[step], out=[[6, 7, seen, list(nodes)], *then])

    def commits(ms: float, position: int, *tokens: int, out: tuple[Any, ...] = ()) -> Line:
        return does(ms, "commit", message=[5, 7, position, list(tokens)], out=list(out))

    return [
        does(10, "open", message=[4, 7, [1, 2, 3], [16, 64], 3], out=[["start", 1, 0, 3, 32]]),
        drafted(15, 1, 10, [1, 0, 10, -0.1, 0.4]),
        drafted(20, 1, 11, [2, 1, 11, -0.7, 1.5], [3, 1, 12, -1.2, 1.5], then=(["start", 2, 3, 5, 8],)),
        drafted(25, 1, 13, [4, 2, 13, -0.2, 0.6]),
        drafted(25.1, 2, 20, [5, 3, 20, -0.3, 0.8]),
        drafted(26, 1, 14, [6, 4, 14, -0.2, 0.5]),
        drafted(26.1, 2, 21, [7, 5, 21, -0.1, 0.3]),
        commits(50, 3, 10),
        commits(90, 4, 12, out=(["stop", 1],)),
        drafted(95, 2, 31, [8, 7, 31, -0.9, 1.6], [9, 7, 32, -1.3, 1.6], seen=5),
        drafted(96, 2, 33, [10, 8, 33, -0.2, 0.4], seen=5),
        drafted(125, 2, 34, [11, 10, 34, -0.2, 0.4], seen=5),
        commits(131, 5, 20, 21, 30, out=(["stop", 2], ["start", 3, 12, 8, 32])),
        drafted(155, 3, 40, [13, 12, 40, -0.5, 1.1], [14, 12, 41, -1.1, 1.1], seen=8),
        drafted(156, 3, 42, [15, 13, 42, -0.1, 0.2], seen=8),
        commits(171, 8, 40),
        does(180, "ended", branch=3, out=[]),
        commits(220, 9, 42, 43),
        does(230, "close", out=[]),
    ]


def plain_request(key: str = "req-b") -> list[Line]:
    """A request that no drafter serves."""
    return [
        call(0, key, "begin", context=[5]),
        call(20, key, "commit", tokens=[6], out=[]),
        call(60, key, "commit", tokens=[7], out=[]),
        call(61, key, "close", out=[]),
    ]


def write_pair(folder: Path) -> tuple[Path, Path]:
    """The pair of logs written by hand."""
    controller = write(
        folder / "controller.jsonl", [header("controller", CONTROLLER_S), *at_controller(), *plain_request()]
    )
    drafter = write(folder / "drafter.jsonl", [header("drafter", DRAFTER_S), *at_drafter()])
    return controller, drafter


class Language:
    """Made-up models: the draft model's best token is the target's in about three of four positions."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[tuple[int, ...], tuple[list[tuple[int, float]], float, int]] = {}

    def __call__(self, context: tuple[int, ...]) -> tuple[list[tuple[int, float]], float, int]:
        """The draft model's four best tokens with log-probabilities, its entropy, and the target's token."""
        key = context[-3:]
        if key not in self._known:
            rng = Random(f"{self._seed} {key}")
            best = rng.choice((0.95, 0.9, 0.8, 0.5, 0.35))
            weights = [best, (1 - best) * 0.5, (1 - best) * 0.25, (1 - best) * 0.1]
            tokens = rng.sample(range(5, 4000), 5)
            entropy = -sum(weight * math.log(weight) for weight in weights) + (1 - best) * 0.6
            target = rng.choices(tokens, [best + 0.1, *weights[1:], (1 - best) * 0.15])[0]
            top = [(token, math.log(weight)) for token, weight in zip(tokens, weights, strict=False)]
            self._known[key] = top, entropy, target
        return self._known[key]


class MadeUp:
    """A run of one request with a drafter, in virtual time: plausible logs, not right ones in every detail.

    The drafter takes an engine step of 5 ms for all its branches; the target one of 35 ms and 0.1 ms per draft token.
    """

    def __init__(self, seed: int, *, rtt_ms: float, limit: int, branches: int, key: str, start_ms: float) -> None:
        self.language = Language(seed)
        self.rng = Random(seed)
        self.way_ms, self.limit, self.width = rtt_ms / 2, limit, branches
        self.key, self.peer, self.start_ms = key, f"{seed:08x}#1", start_ms
        self.controller: list[Line] = []
        self.drafter: list[Line] = []
        self.context = tuple(self.rng.randrange(5, 4000) for _ in range(30))
        self.here, self.there = TreeCopy(30, keep=False), TreeCopy(30, keep=False)
        self.known = self.context
        self.texts: dict[int, tuple[int, ...]] = {0: self.context}
        self.running: dict[int, list[int]] = {}
        self.leaves: list[tuple[float, int]] = []
        self.started = self.last_id = 0
        self.up: list[tuple[float, list[Any]]] = []
        self.down: list[tuple[float, list[Any]]] = []

    def run(self, tokens: int) -> None:
        """Generate that many tokens."""
        length = len(self.context)
        opened = [4, 1, list(self.context), [24, 512, 4, self.width, 6, 1.0, 0.05, 1], 0, 0.0, 0, None]
        self._log(0, "begin", context=list(self.context))
        self._log(0, "link", drafter="west", peer=self.peer)
        self._log(0, "open", vocab_size=4000, out=[opened])
        self._log_there(self.way_ms, "open", message=opened, out=self._steer())
        now, engine, draft = 60.0, self.way_ms + 20.0, []
        while len(self.context) < length + tokens:
            engine = self._drafter_until(now, engine)
            self._receive_until(now)
            accepted: list[int] = []
            while draft and len(accepted) < len(draft):
                if draft[len(accepted)] != self.language((*self.context, *accepted))[2]:
                    break
                accepted.append(draft[len(accepted)])
            accepted.append(self.language((*self.context, *accepted))[2])
            message = [5, 1, len(self.context), accepted]
            self._log(now, "commit", tokens=accepted, out=[message])
            self.up.append((now + self.way_ms + self.rng.random(), message))
            self.context += tuple(accepted)
            for token in accepted:
                self.here.commit(token, 0)
            self._take(now)
            now += 0.6
            if not self._take(now) and self.rng.random() < 0.5:
                waited = self.rng.uniform(1, 9)
                now += waited
                engine = self._drafter_until(now, engine)
                self._receive_until(now)
                self._log(now, "wait", waited_s=waited / 1e3)
            draft = self._take(now + 0.01)
            now += 35 + 0.1 * len(draft) + self.rng.random()
        self._log(now, "close", out=[[7, 1]])
        self._log_there(now + self.way_ms, "close", out=[["stop", branch] for branch in self.running])

    def _log(self, ms: float, name: str, **data: Any) -> None:
        self.controller.append(call(round(self.start_ms + ms, 3), self.key, name, **data))

    def _log_there(self, ms: float, name: str, **data: Any) -> None:
        self.drafter.append(call(round(self.start_ms + ms, 3), self.peer, name, DRAFTER_S, **data))

    def _take(self, now: float) -> list[int]:
        tokens = [node.token for node in self.here.best_path()[: self.limit]]
        self._log(now, "draft", limit=self.limit, least=0.05, out=tokens)
        return tokens

    def _receive_until(self, now: float) -> None:
        while self.down and self.down[0][0] <= now:
            at, message = self.down.pop(0)
            self.here.catch_up(message[2], at, 0)
            self.here.append(message[3], at, 0)
            self._log(at, "receive", message=message, out=[])

    def _drafter_until(self, now: float, engine: float) -> float:
        while engine <= now:
            while self.up and self.up[0][0] <= engine:
                self._committed(*self.up.pop(0))
            for count, branch in enumerate(list(self.running)):
                self._drafted(engine + count / 100, branch)
            engine += 5 + 0.02 * len(self.running)
        return engine

    def _send(self, now: float, nodes: list[list[Any]]) -> list[Any]:
        for number, parent, token, *_ in nodes:
            self.texts[number] = (*self.texts[parent], token)
        self.there.append(nodes, now, 0)
        message = [6, 1, len(self.known), nodes]
        soonest = self.down[-1][0] if self.down else 0.0
        self.down.append((max(soonest, now + self.way_ms + self.rng.random() / 2), message))
        return message

    def _committed(self, at: float, message: list[Any]) -> None:
        self.known += tuple(message[3])
        out = []
        for token in message[3]:
            self.there.commit(token, 0)
        text = self.texts[self.there.cursor.id]
        for node in self.there.catch_up(len(self.known), at, 0):
            self.last_id = node.id
            self.texts[node.id] = text = (*text, node.token)
        for branch, (tip, _) in list(self.running.items()):
            if self.there.find(tip) is None:
                del self.running[branch]
                out.append(["stop", branch])
        self._log_there(at, "commit", message=message, out=[*out, *self._steer()])

    def _drafted(self, at: float, branch: int) -> None:
        if branch not in self.running:
            return
        tip, left = self.running[branch]
        top, entropy, _ = self.language(self.texts[tip])
        nodes = []
        for token, logprob in top if entropy >= 1.0 and self.there.size < 150 else top[:1]:
            self.last_id += 1
            nodes.append([self.last_id, tip, token, round(logprob, 4), round(entropy, 4)])
            if len(nodes) > 1:
                self.leaves.append((logprob, self.last_id))
        self.running[branch] = [nodes[0][0], left - 1]
        out = [self._send(at, nodes)]
        if left <= 1:
            del self.running[branch]
            out.append(["stop", branch])
        step = [*top[0], entropy, [list(pair) for pair in top[1:]]]
        self._log_there(at, "drafted", branch=branch, steps=[step], out=[*out, *self._steer()])

    def _steer(self) -> list[list[Any]]:
        actions = []
        path = self.there.best_path()
        tip = path[-1].id if path else self.there.cursor.id
        if all(at != tip for at, _ in self.running.values()) and len(path) < 20:
            actions.append(self._start(tip, 24 - len(path)))
        self.leaves = sorted(leaf for leaf in self.leaves if self.there.find(leaf[1]) is not None)
        main = any(at == tip for at, _ in self.running.values())
        while self.leaves and len(self.running) < self.width - (not main):
            actions.append(self._start(self.leaves.pop()[1], 6))
        return actions

    def _start(self, node: int, tokens: int) -> list[Any]:
        self.started += 1
        self.running[self.started] = [node, tokens]
        return ["start", self.started, node, len(self.texts[node]), tokens]


def write_made_up(folder: Path, requests: int = 1, tokens: int = 128, **options: Any) -> tuple[Path, Path]:
    """A pair of logs of requests that begin 200 ms after one another."""
    options = {"rtt_ms": 30.0, "limit": 8, "branches": 8, **options}
    runs = [MadeUp(seed, key=f"cmpl-{seed:04d}", start_ms=200.0 * seed, **options) for seed in range(requests)]
    for run in runs:
        run.run(tokens)
    lines = sorted((line for run in runs for line in run.controller), key=lambda line: line["t"])
    controller = write(folder / "controller.jsonl", [header("controller", CONTROLLER_S), *lines])
    lines = sorted((line for run in runs for line in run.drafter), key=lambda line: line["t"])
    return controller, write(folder / "drafter.jsonl", [header("drafter", DRAFTER_S), *lines])
