"""A litmus test of the device walk on a real GPU: ``python scripts/walk_litmus.py`` (torch and Triton, no vLLM).

A thread publishes trees into pinned memory all the time, while the kernel walks again and again on the GPU. Each token
carries the number of its publication and its place in the tree, so that a draft tells which publication it is of: all
its tokens must be of one, of its slot, no older than what was published before the launch, and lie one below the other
on that tree's best path. Anything else is a violation. Then the walk is timed, while nothing is published.

Ends with 0 where nothing was violated, 1 where something was, 2 where there is no GPU to ask.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

from vllm_wanspec.controller.mrv2.memory import DeviceMemory
from vllm_wanspec.controller.mrv2.walk import DeviceWalk
from vllm_wanspec.core.block import BEST, BLOCK_NODES, UNDER_ROOT, Publication, word

Ints = npt.NDArray[np.int64]

SLOTS, HOT_SLOTS, LIMIT = 256, 4, 8
"""Rows of a batch, slots that are published to (few, so that they change under a walk), most tokens of a draft."""
CONTEXT = 100
"""Tokens of each request."""
PLACE_BITS = 7
NUMBERS = 2**17 - 1
"""Publications before a number comes again."""
CONTEXT_TOKEN = NUMBERS << PLACE_BITS
"""Of all positions of a context: what no draft may have, though it is in the vocabulary."""
VOCAB_SIZE = CONTEXT_TOKEN + 1
FILLER = 5
FAMILIES, BURST = 24, 3
HELD_POLL_S = SWITCH_INTERVAL_S = 1e-4
WALKS = 64
"""Launches of a batch, between two looks at what was found."""


@dataclass(frozen=True)
class Shape:
    """A tree but for the number in its tokens.

    Attributes:
        words: With the place of each node as its token, or the context's token.
        numbered: 1 for nodes whose token gets a number.
        followed: Tokens of the context below its root.
        path: Places of the draft, at most LIMIT.
    """

    words: Ints
    numbered: Ints
    followed: int
    path: list[int]


def make_family(rng: random.Random) -> list[Shape]:
    """A tree as it grows: its first nodes, more of them, all."""
    followed, size = rng.choice([0, 0, 1, 3, 9, 20]), rng.randint(40, BLOCK_NODES)
    parents = [UNDER_ROOT, *range(size)][:followed]
    favourites = {parent: place for place, parent in enumerate(parents)}
    end = followed - 1 if followed else UNDER_ROOT
    for place in range(followed, size):
        # Mostly on from the last nodes, so that there are long paths.
        parent = end if place == followed or rng.random() < 0.1 else rng.randrange(max(followed, place - 4), place)
        parents.append(parent)
        if rng.random() < 0.8:
            favourites.setdefault(parent, place)
    best = set(favourites.values())
    tokens = [CONTEXT_TOKEN if place < followed else place for place in range(size)]
    made = [word(parents[place], tokens[place], 255, BEST if place in best else 0) for place in range(size)]
    path: list[int] = []
    node = end
    while node in favourites and len(path) < LIMIT:
        node = favourites[node]
        path.append(node)
    return [
        Shape(
            np.array(made[:count], np.int64),
            (np.arange(count) >= followed).astype(np.int64),
            followed,
            [place for place in path if place < count],
        )
        for count in (followed + 4, (followed + size) // 2, size)
    ]


class Writer:
    """Publishes trees of all shapes, and knows what it published under each number.

    Attributes:
        shapes: All that there are, in families of BURST.
        published: Publications so far.
        latest: [SLOTS], which publication was each slot's last.
        shape_of: [NUMBERS], index of the shape that was last published under a number.
        slot_of: [NUMBERS], the slot.
    """

    def __init__(self, publication: Publication, rng: random.Random) -> None:
        """Publish each slot's first tree."""
        self._publication = publication
        self._rng = rng
        self.shapes = [shape for _ in range(FAMILIES) for shape in make_family(rng)]
        self._buffers = [array("q", bytes(8 * len(shape.words))) for shape in self.shapes]
        self.published = 0
        self.latest = np.zeros(SLOTS, np.int64)
        self.shape_of, self.slot_of = np.full(NUMBERS, -1, np.int64), np.full(NUMBERS, -1, np.int64)
        self._stop, self._hold, self._held = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        for slot in range(SLOTS):
            self.publish(slot, self._family(slot % FAMILIES))

    def publish(self, slot: int, shapes: list[int]) -> None:
        """Publish different shapes, one right after the other."""
        for ahead, index in enumerate(shapes):
            number = (self.published + ahead) % NUMBERS
            self.shape_of[number], self.slot_of[number] = index, slot
            words = np.frombuffer(self._buffers[index], np.int64)
            np.multiply(self.shapes[index].numbered, number << 24 + PLACE_BITS, out=words)
            words |= self.shapes[index].words
        for index in shapes:
            self._publication.publish(slot, CONTEXT - self.shapes[index].followed, self._buffers[index])
        self.published += len(shapes)
        self.latest[slot] = self.published - 1

    def step(self) -> None:
        """Have a tree grow in a slot and another take its place, sometimes that of a request which has just come."""
        slot = self._rng.randrange(HOT_SLOTS)
        if self._rng.random() < 0.02:
            self._publication.clear(slot)
        first, second = self._rng.sample(range(FAMILIES), 2)
        self.publish(slot, self._family(first) + self._family(second))

    def start(self) -> None:
        """Publish all the time, in a thread."""
        self._thread.start()

    def hold(self) -> None:
        """Return when nothing is published any more."""
        self._held.clear()
        self._hold.set()
        self._held.wait()

    def go_on(self) -> None:
        """Publish again after `hold`."""
        self._hold.clear()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _family(self, index: int) -> list[int]:
        return list(range(index * BURST, (index + 1) * BURST))

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._hold.is_set():
                self._held.set()
                time.sleep(HELD_POLL_S)
            else:
                self.step()


@dataclass
class Tally:
    """What walks found: rows of batches, and what was wrong with them."""

    walks: int = 0
    words_dropped: int = 0
    shortened: int = 0
    without_draft: int = 0
    violations: int = 0

    def add(self, told: Ints, slots: Ints, writer: Writer, before: Ints) -> None:
        """Look at what walks told; nothing is published meanwhile.

        Args:
            told: [walks, rows, 1 + LIMIT].
            slots: [rows], the slot of each.
            writer: That published what the walks saw.
            before: [SLOTS], each slot's latest publication before the walks were launched.

        Raises:
            RuntimeError: So much was published that a number may stand for two publications.
        """
        if writer.published - before[slots].min() >= NUMBERS:
            raise RuntimeError("numbers have come round within one batch")
        found, dropped, tokens = told[..., 0] & 0xFF, told[..., 0] >> 16, told[..., 1:]
        drafted = np.arange(LIMIT) < found[..., None]
        number, place = tokens >> PLACE_BITS, tokens & (1 << PLACE_BITS) - 1
        first = number[..., 0].clip(0, NUMBERS - 1)
        shape = writer.shape_of[first]
        paths = np.array([[*shape.path, *[-1] * (LIMIT - len(shape.path))] for shape in writer.shapes])
        good = (number == first[..., None]) & (place == paths[shape])
        sound = (np.where(drafted, good, tokens == FILLER)).all(axis=-1) & (told[..., 0] >= 0) & (found <= LIMIT)
        of_slot = (writer.slot_of[first] == slots) & (
            (first - before[slots]) % NUMBERS < writer.published - before[slots]
        )
        self.walks += found.size
        self.words_dropped += int(dropped.sum())
        self.without_draft += int((found == 0).sum())
        self.shortened += int(((found > 0) & (found < (paths[shape] >= 0).sum(axis=-1))).sum())
        self.violations += int((~sound | ((found > 0) & ~of_slot)).sum())


@dataclass(frozen=True)
class Times:
    """Microseconds of a walk over so many rows: on the GPU, within a captured graph, and of the host to launch it."""

    rows: int
    median_us: float
    p99_us: float
    in_graph_us: float
    host_us: float


class Bench:
    """A kernel over memory of its own on the GPU, and a writer for it."""

    def __init__(self, seed: int) -> None:
        """Allocate, publish the first trees, and compile."""
        import torch

        self.torch = torch
        self.device = torch.device("cuda")
        # Triton takes the address that the GPU has for a pinned tensor by itself.
        self.memory = DeviceMemory(SLOTS, LIMIT, self.device, lambda pinned: pinned, ring=WALKS)
        self.writer = Writer(Publication(self.memory.headers, self.memory.words), random.Random(seed))
        states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=self._full((SLOTS, 2 * CONTEXT), CONTEXT_TOKEN, torch.int32)),
            total_len=SimpleNamespace(gpu=self._full((SLOTS,), CONTEXT, torch.int32)),
            last_sampled_tokens=self._full((SLOTS, 1), FILLER, torch.int64),
            draft_tokens=self._full((SLOTS, LIMIT), 0, torch.int64),
        )
        self.walk = DeviceWalk(self.memory, states, LIMIT, VOCAB_SIZE, self.device)
        self.all_slots = torch.arange(SLOTS, device=self.device)
        for count in (True, False):
            self.walk.run_kernel(self.all_slots, 0, count_dropped=count)
        torch.cuda.synchronize()

    def _full(self, shape: tuple[int, ...], value: int, dtype: Any) -> Any:
        return self.torch.full(shape, value, dtype=dtype, device=self.device)

    def graph(self, rows: Any, count_dropped: bool) -> Any:
        """WALKS launches for a batch, captured."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            for index in range(WALKS):
                self.walk.run_kernel(rows, index, count_dropped=count_dropped)
        return graph

    def race(self, seconds: float) -> Tally:
        """Walk while the writer publishes."""
        rows = self.all_slots % HOT_SLOTS
        tally, graph, slots = Tally(), self.graph(rows, count_dropped=True), rows.cpu().numpy()
        self.writer.start()
        end_s = time.monotonic() + seconds
        try:
            while time.monotonic() < end_s:
                before = self.writer.latest.copy()
                for index in range(WALKS):
                    self.memory.told(index).fill(-1)
                graph.replay()
                self.torch.cuda.synchronize()
                self.writer.hold()
                tally.add(np.stack([self.memory.told(index) for index in range(WALKS)]), slots, self.writer, before)
                self.writer.go_on()
        finally:
            self.writer.stop()
        return tally

    def times(self, rows: int) -> Times:
        """Time walks for a batch of so many rows."""
        here = self.all_slots[:rows]
        self.walk.run_kernel(here, 0)
        gpu_us = np.concatenate([self._event_times_us(here) for _ in range(10)])
        graph, replays = self.graph(here, count_dropped=False), []
        for _ in range(100):
            begin, end = self._event(), self._event()
            begin.record()
            graph.replay()
            end.record()
            self.torch.cuda.synchronize()
            replays.append(begin.elapsed_time(end) * 1e3 / WALKS)
        begin_s = time.perf_counter()
        for _ in range(200):
            self.walk.launch(here, 0)
        host_us = (time.perf_counter() - begin_s) * 1e6 / 200
        self.torch.cuda.synchronize()
        figures = (*np.percentile(gpu_us, [50, 99]), np.median(replays), host_us)
        return Times(rows, *(round(float(figure), 2) for figure in figures))

    def _event(self) -> Any:
        return self.torch.cuda.Event(enable_timing=True)

    def _event_times_us(self, rows: Any) -> npt.NDArray[np.float64]:
        """Times of 100 walks that were all enqueued before the first of them began."""
        pairs = [(self._event(), self._event()) for _ in range(100)]
        self.torch.cuda._sleep(50_000_000)  # clock ticks
        for begin, end in pairs:
            begin.record()
            self.walk.launch(rows, 0)
            end.record()
        self.torch.cuda.synchronize()
        return np.array([begin.elapsed_time(end) * 1e3 for begin, end in pairs])


def missing() -> str | None:
    """What keeps this machine from the test, in one line; None if nothing does."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def main(arguments: list[str] | None = None) -> int:
    """Run it; see the module's head for the status."""
    parser = argparse.ArgumentParser(description="A litmus test of the device walk, on an NVIDIA GPU.")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to walk while trees are published (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the trees (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    options = parser.parse_args(arguments)
    if problem := missing():
        print(f"walk_litmus: {problem}: this needs an NVIDIA GPU, torch and Triton", file=sys.stderr)
        return 2
    import torch
    import triton

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    bench = Bench(options.seed)
    tally = bench.race(options.seconds)
    times = [bench.times(rows) for rows in (1, 64, 256)]
    place = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(f"{value}" for value in place.values()))
    print(f"{bench.writer.published} publications, " + ", ".join(f"{v} {k}" for k, v in asdict(tally).items()))
    print(f"{'rows':>5}{'median µs':>12}{'p99 µs':>10}{'in a graph µs':>16}{'host µs':>10}")
    for row in times:
        print(f"{row.rows:>5}{row.median_us:>12}{row.p99_us:>10}{row.in_graph_us:>16}{row.host_us:>10}")
    if options.json:
        result = place | {"seconds": options.seconds, "publications": bench.writer.published, "tally": asdict(tally)}
        result |= {"times": [asdict(row) for row in times]}
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return int(tally.violations > 0)


if __name__ == "__main__":
    sys.exit(main())
