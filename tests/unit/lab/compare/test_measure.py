"""The side-by-side bench's requests and prompts, with stand-ins for the servers."""

from __future__ import annotations

import asyncio
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.arms import named_arms
from vllm_wanspec.lab.compare.loads import serve
from vllm_wanspec.lab.compare.measure import Measurement, Station, remaining
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.compare.prepass import best_setting, trial_count, tried_ms
from vllm_wanspec.lab.compare.references import take_references, usable
from vllm_wanspec.lab.harness.client import ClientError, Completion, CompletionClient
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.models import Prompt
from vllm_wanspec.lab.harness.probes import Probe
from vllm_wanspec.lab.harness.wan_control import Wan
from vllm_wanspec.lab.records import Cell, Journal, Load, Reference, Setting, Trial

EXPECTED = tuple(range(100, 125))
NAME = attrgetter("name")


def options_for(**changes: Any) -> Options:
    settings: dict[str, Any] = {"target": "/big", "draft": "/small", "prompts": Path("/p"), "repeats": 2, "count": 3}
    settings |= {"arms": ("none", "wanspec"), "concurrent_arms": (), "rtt_ms": (0.0, 20.0)} | changes
    return Options(**(settings | {name: named_arms(name, settings[name]) for name in ("arms", "concurrent_arms")}))


@pytest.fixture
def journals(tmp_path: Path) -> Iterator[Any]:
    """Takes up one and the same journal, again and again."""
    with ExitStack() as stack:

        def take_up(name: str = "journal") -> Journal:
            journal = Journal(tmp_path / name, {})
            stack.callback(journal.close)
            return journal

        yield take_up


def with_references(journal: Journal, count: int = 3) -> Journal:
    for index in range(count):
        journal.add(Reference(index, f"m{index}", "def", (index,), EXPECTED, (0,) * len(EXPECTED)))
    return journal


class FakeClient:
    """Gives the expected text in pieces of two tokens after the first, except where told otherwise."""

    def __init__(self, log: list[str], name: str, wrong_at: int | None = None, tie: bool = False) -> None:
        self.log, self.name, self.wrong_at, self.tie = log, name, wrong_at, tie
        self.running = self.most_running = 0
        self.fail_at: int | None = None
        self.salts: list[str] = []
        self.sampling: set[tuple[float, bool]] = set()

    async def complete(
        self, prompt: Any, max_tokens: int, *, temperature: float = 0.0, ignore_eos: bool = False,
        extra: Any = None, on_text: Any = None,
    ) -> Completion:  # fmt: skip
        if isinstance(prompt, str):
            self.log.append(f"{self.name} warm-up")
            return Completion((0,), (1,), "", 1.0, 1.0, "length")
        if self.fail_at is not None and len(self.log) >= self.fail_at:
            raise ClientError("the server is gone")
        self.log.append(f"{self.name} {prompt[0]}")
        self.salts.append(f"{prompt[0]} {extra['cache_salt']}")
        self.sampling.add((temperature, ignore_eos))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        ids = [token + (place == self.wrong_at) for place, token in enumerate(EXPECTED[:max_tokens])]
        pieces = ((40.0, 1), *((40.0 + 10.0 * place, 2) for place in range(2, max_tokens, 2)))
        return Completion(tuple(prompt), tuple(ids), "", 40.0, 40.0 + 10.0 * (max_tokens - 1), "length", pieces)

    async def is_tie(self, prompt_ids: object, plain_ids: object, other_ids: object, position: int) -> bool:
        assert plain_ids == EXPECTED
        return self.tie


class FakeProbe:
    """Counts up by one per reading."""

    def __init__(self) -> None:
        self.count = 0.0
        self.rtt_ms = 20.5
        self.settled_at: list[float | None] = []

    def cpu_s(self) -> dict[str, float]:
        self.count += 1.0
        return {"target": self.count / 4}

    async def read(self) -> Counters:
        return Counters({"hits": self.count})

    async def settled(self, rtt_ms: float | None) -> Counters:
        self.settled_at.append(rtt_ms)
        return Counters({"hits": self.count + 5.0})


class FakeWan:
    def __init__(self, log: list[str], near: bool = True) -> None:
        self.log, self.near = log, near

    async def set(self, rtt_ms: float, jitter_ms: float = 0.0, loss: float = 0.0) -> bool:
        self.log.append(f"R {rtt_ms:g}" + (f" ± {jitter_ms:g}, {loss:g}" if jitter_ms or loss else ""))
        return self.near


class Stage:
    """A measurement over stand-ins."""

    def __init__(self, options: Options, journal: Journal, near: bool = True) -> None:
        self.log: list[str] = []
        self.screen = Console(file=io.StringIO(), width=160)
        self.clients = {arm: FakeClient(self.log, arm) for arm in map(NAME, options.started)}
        self.probes = {arm: FakeProbe() for arm in map(NAME, options.started)}
        self.control = Path(journal.path.parent, "control.json")
        stations = {
            (arm.name, load): self.station(arm.name, Setting(3 * load.concurrency))
            for arm in options.started
            for load in options.loads(arm)
        }
        plain = cast(CompletionClient, self.clients["none"])
        wan = cast(Wan, FakeWan(self.log, near))
        self.measurement = Measurement(options, journal, plain, stations, wan, self.screen)

    def station(self, arm: str, setting: Setting) -> Station:
        client, probe = cast(CompletionClient, self.clients[arm]), cast(Probe, self.probes[arm])
        return Station(client, probe, self.control if arm == "draft_model_lookup" else None, setting)

    def run(self) -> None:
        asyncio.run(self.measurement.run())

    @property
    def printed(self) -> str:
        assert isinstance(self.screen.file, io.StringIO)
        return self.screen.file.getvalue()


def test_every_prompt_goes_once_per_repeat_through_every_cell(journals: Any) -> None:
    options = options_for()
    journal = with_references(journals())
    assert remaining(options, journal) == 2 * 3 * 3
    stage = Stage(options, journal)
    stage.run()
    assert remaining(options, journal) == 0
    done = [(batch.cell, batch.repeat, request.prompt) for batch in journal.batches for request in batch.requests]
    wanted = [Cell("none", None, 1), Cell("wanspec", 0.0, 1), Cell("wanspec", 20.0, 1)]
    assert Counter(done) == Counter(itertools.product(wanted, range(2), range(3)))
    salts = stage.clients["wanspec"].salts
    assert len(set(salts)) == len(salts)  # no prompt is in the target's cache when it comes again
    assert set(stage.probes["none"].settled_at) == {None}
    assert set(stage.probes["wanspec"].settled_at) == {0.0, 20.0}


def test_the_round_trip_is_set_before_each_block_and_its_links_are_warmed_up(journals: Any) -> None:
    stage = Stage(options_for(repeats=1), with_references(journals()))
    stage.run()
    trips = [place for place, entry in enumerate(stage.log) if entry.startswith("R ")]
    assert sorted(stage.log[place] for place in trips) == ["R 0", "R 20"]
    assert trips[0] == 0
    assert [stage.log[place + 1] for place in trips] == ["wanspec warm-up"] * 2


def test_a_time_scale_lengthens_the_round_trips(journals: Any) -> None:
    stage = Stage(options_for(repeats=1, time_scale=1.5), with_references(journals()))
    stage.run()
    assert {entry for entry in stage.log if entry.startswith("R ")} == {"R 0", "R 30"}
    assert set(stage.probes["wanspec"].settled_at) == {0.0, 30.0}
    assert {batch.cell.rtt_ms for batch in stage.measurement.journal.batches} == {None, 0.0, 20.0}


def test_arms_alternate_within_a_block(journals: Any) -> None:
    options = options_for(arms=("none", "ngram", "oracle"), repeats=1)
    stage = Stage(options, with_references(journals()))
    stage.run()
    names = [entry.split()[0] for entry in stage.log]
    assert all(set(names[start : start + 3]) == {"none", "ngram", "oracle"} for start in (0, 3, 6))
    assert len({tuple(names[start : start + 3]) for start in (0, 3, 6)}) == 3


def test_a_request_is_written_down_as_the_client_saw_it(journals: Any) -> None:
    journal = with_references(journals(), 1)
    Stage(options_for(arms=("none",), repeats=1, count=1), journal).run()
    (batch,) = journal.batches
    (request,) = batch.requests
    assert (request.ttft_ms, request.time_ms, request.tokens, request.steps) == (40.0, 240.0, 24, 12)
    # Two readings of the processor, five counts that only settling shows.
    assert batch.counters == Counters({"hits": 2.0 + 5.0})
    assert batch.cpu_s == {"target": 0.25}
    assert batch.rtt_ms == 20.5
    assert (batch.ties, batch.wrong) == ((), ())


@pytest.mark.parametrize("tie", [True, False])
def test_another_output_is_a_tie_or_wrong(journals: Any, tie: bool) -> None:
    journal = with_references(journals(), 1)
    stage = Stage(options_for(arms=("none", "ngram"), repeats=1, count=1), journal)
    stage.clients["ngram"].wrong_at = 7
    stage.clients["none"].tie = tie
    stage.run()
    batches = {batch.cell.arm: batch for batch in journal.batches}
    assert batches["none"].wrong == ()
    wrong = "m0: at generated position 7: plain token 107, here 108"
    assert (batches["ngram"].ties, batches["ngram"].wrong) == (((wrong,), ()) if tie else ((), (wrong,)))
    assert ("error: ngram: different output" in stage.printed) is not tie
    assert ("floating-point tie in m0: at generated position 7" in stage.printed) is tie
    assert ("the prompt ends with 'def'" in stage.printed) is not tie


def test_above_concurrency_1_all_prompts_are_one_batch(journals: Any) -> None:
    options = options_for(concurrency=(2,), concurrent_arms=("none", "wanspec"), concurrent_rtt_ms=(20.0,), repeats=1)
    journal = with_references(journals())
    stage = Stage(options, journal)
    stage.run()
    assert {batch.cell for batch in journal.batches} == {Cell("none", None, 2), Cell("wanspec", 20.0, 2)}
    assert [[request.prompt for request in batch.requests] for batch in journal.batches] == [[0, 1, 2]] * 2
    assert stage.clients["none"].most_running == 2


@pytest.mark.parametrize("concurrency", [1, 2])
def test_an_interrupted_run_goes_on_where_it_stopped(journals: Any, concurrency: int) -> None:
    above = {"concurrent_arms": ("none", "wanspec"), "concurrent_rtt_ms": (0.0, 20.0)}
    options = options_for(concurrency=(concurrency,), **above)
    journal = with_references(journals())
    first = Stage(options, journal)
    for client in first.clients.values():
        client.fail_at = 8
    with pytest.raises(ClientError, match="the server is gone"):
        first.run()
    done = len(journal.batches)
    assert done
    left = remaining(options, journal)
    assert left == 18 - sum(len(batch.requests) for batch in journal.batches)
    journal.close()

    journal = journals()
    second = Stage(options, journal)
    second.run()
    asked = [entry for entry in second.log if entry.split()[1].isdigit() and not entry.startswith("R ")]
    assert len(asked) == left
    keys = [(batch.cell, batch.repeat, one.prompt) for batch in journal.batches for one in batch.requests]
    assert len(keys) == len(set(keys)) == 18


def test_a_finished_run_asks_nothing_more(journals: Any) -> None:
    journal = with_references(journals())
    Stage(options_for(), journal).run()
    again = Stage(options_for(), journal)
    again.run()
    assert again.log == []


def test_links_that_measure_something_else_are_told_of(journals: Any) -> None:
    stage = Stage(options_for(repeats=1), with_references(journals()), near=False)
    stage.run()
    assert "the links do not measure R = 20 ms" in stage.printed


def test_jitter_and_loss_are_set_with_the_round_trip(journals: Any) -> None:
    options = options_for(repeats=1, rtt_ms=(20.0,), jitter_ms=4.0, loss=0.01, time_scale=1.5)
    stage = Stage(options, with_references(journals()))
    stage.run()
    assert stage.log[0] == "R 30 ± 6, 0.01"


def test_sampled_outputs_have_their_length_and_are_not_compared(journals: Any) -> None:
    journal = with_references(journals(), 1)
    stage = Stage(options_for(arms=("none", "ngram"), repeats=1, count=1, temperature=0.7), journal)
    stage.clients["ngram"].wrong_at = 7
    stage.run()
    assert [batch.wrong for batch in journal.batches] == [(), ()]
    assert stage.clients["ngram"].sampling == {(0.7, True)}


def test_a_shared_target_is_told_its_setting_before_each_load(journals: Any) -> None:
    arms = ("none", "draft_model_lookup")
    options = options_for(arms=arms, concurrent_arms=arms[1:], concurrency=(1, 2), repeats=1)
    stage = Stage(options, with_references(journals()))
    told: list[str] = []
    client = stage.clients["draft_model_lookup"]
    asked = client.complete

    async def complete(*arguments: Any, **named: Any) -> Completion:
        told.append(stage.control.read_text())
        return await asked(*arguments, **named)

    client.complete = complete  # type: ignore[method-assign]
    stage.run()
    assert told == ['{"gamma": 3}'] * 3 + ['{"gamma": 6}'] * 3


def test_requests_at_a_rate_are_sent_at_the_same_random_times_to_everybody() -> None:
    references = [Reference(index, "m", "def", (index,), EXPECTED, (0,) * 25) for index in range(40)]

    async def sent_s() -> list[float]:
        at_s: list[float] = []
        loop = asyncio.get_running_loop()
        began_s = loop.time()

        async def ask(reference: Reference) -> None:
            at_s.append(loop.time() - began_s)

        await serve(Load(0, 200.0), references, ask)
        return at_s

    first, second = asyncio.run(sent_s()), asyncio.run(sent_s())
    assert first == pytest.approx(second, abs=0.05)
    assert 0.1 < first[-1] < 0.4  # 40 at 200 per second
    gaps = [after - before for before, after in itertools.pairwise(first)]
    assert max(gaps) > 2 * sum(gaps) / len(gaps)  # not one after the other at equal times


def test_a_request_that_fails_ends_the_others() -> None:
    references = [Reference(index, "m", "def", (index,), EXPECTED, (0,) * 25) for index in range(3)]

    async def ask(reference: Reference) -> None:
        if reference.index == 1:
            raise ClientError("gone")
        await asyncio.sleep(60.0)

    for load in (Load(3), Load(0, 1000.0)):
        with pytest.raises(ClientError, match="gone"):
            asyncio.run(asyncio.wait_for(serve(load, references, ask), 5.0))


def test_the_fastest_setting_is_taken_once_all_are_tried_under_a_load() -> None:
    options = options_for(arms=("draft_model",), gammas=(2, 3, 4))
    (arm,), alone, eight = options.started, Load(), Load(8)
    trials = [Trial("draft_model", alone, Setting(gamma), ms) for gamma, ms in ((2, 22.0), (3, 20.0))]
    trials += [Trial("draft_model", eight, Setting(gamma), 30.0 + gamma) for gamma in (2, 3, 4)]
    trials += [Trial("draft_model_lookup", alone, Setting(4), 1.0)]  # of another arm
    assert best_setting(options, trials, arm, alone) is None
    trials.append(Trial("draft_model", alone, Setting(4), 20.0))
    assert best_setting(options, trials, arm, alone) == Setting(3)
    assert best_setting(options, trials, arm, eight) == Setting(2)
    (only,) = options_for(arms=("draft_model",), gammas=(6,)).started
    assert best_setting(options_for(arms=("draft_model",), gammas=(6,)), [], only, alone) == Setting(6)
    plain = options_for(arms=("none",))
    assert best_setting(plain, [], plain.started[0], alone) is None


def test_a_load_of_many_at_a_time_is_tried_with_more_prompts_than_that() -> None:
    """Six prompts are six streams at most, and γ that is best for six need not be for sixteen."""
    options = options_for(trial_prompts=6)
    loads = (Load(), Load(2), Load(8), Load(16), Load(0, 2.0))
    assert [trial_count(options, load) for load in loads] == [6, 6, 16, 32, 6]


def test_no_trial_finds_its_prompts_in_the_cache_and_each_reaches_its_load(journals: Any) -> None:
    journal, client = with_references(journals(), 16), FakeClient([], "draft_model")
    options = options_for(count=16, trial_prompts=2)
    console, asked = Console(file=io.StringIO()), cast(CompletionClient, client)
    for tried in ((Setting(2), Load()), (Setting(2), Load(8)), (Setting(3), Load(8))):
        assert asyncio.run(tried_ms(options, journal, console, asked, tried)) == 10.0
    assert client.most_running == 8
    assert len(client.salts) == len(set(client.salts)) == 2 + 16 + 16


class TextClient:
    """A target whose texts are of given lengths; a draft model that ranks everything first."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.asked: list[str] = []

    async def complete(self, prompt: str, max_tokens: int, on_text: Any) -> Completion:
        self.asked.append(prompt)
        ids = tuple(range(self.lengths[int(prompt)]))
        pieces = tuple((5.0 * place, 1) for place in range(2 * len(ids)))
        return Completion((int(prompt),), ids * 2, "", 0.0, 5.0 * (2 * len(ids) - 1), None, pieces)  # repeats itself

    async def ranks(self, prompt_ids: Sequence[int], following: Sequence[int]) -> tuple[int | None, ...]:
        return (0,) * len(following)


def take(journal: Journal, client: TextClient, draft: bool, **changes: Any) -> None:
    prompts = [Prompt(f"m{index}", str(index), "comment") for index in range(len(client.lengths))]
    plain = cast(CompletionClient, client)
    ranking = cast(CompletionClient, client) if draft else None
    asyncio.run(take_references(journal, options_for(**changes), prompts, plain, ranking))


def test_prompts_are_taken_in_order_until_there_are_enough_long_texts(journals: Any) -> None:
    journal = journals()
    client = TextClient([30, 20, 24, 40, 50])
    take(journal, client, draft=True, count=3)
    assert client.asked == ["0", "1", "2", "3"]
    assert [one.index for one in usable(journal, options_for(count=3))] == [0, 2, 3]
    first = journal.references[0]
    assert (first.generated, first.time_ms) == (60, 5.0 * 29)  # of the part before it repeats itself
    assert first.kind == "comment"
    assert journal.references[1].ranks == (None,) * 20  # nobody asks about what is not used
    assert (first.expected, first.ranks, first.prompt_ids) == (tuple(range(30)), (0,) * 30, (0,))


def test_prompts_that_were_taken_before_are_not_asked_again(journals: Any) -> None:
    journal = journals()
    with pytest.raises(ConfigError, match=r"only 1 of 2 prompts have 24 tokens .* and 3 are wanted"):
        take(journal, TextClient([30, 20]), draft=False, count=3)
    assert journal.references[0].ranks == (None,) * 30
    client = TextClient([30, 20, 30, 30])
    take(journal, client, draft=False, count=3)
    assert client.asked == ["2", "3"]
    again = TextClient([30, 20, 30, 30])
    take(journal, again, draft=False, count=3)
    assert again.asked == []


def test_all_texts_are_used_where_no_number_is_wanted(journals: Any) -> None:
    journal = journals()
    client = TextClient([30, 20, 24])
    take(journal, client, draft=False, count=None)
    assert client.asked == ["0", "1", "2"]
    assert [one.index for one in usable(journal, options_for(count=None))] == [0, 2]
    assert remaining(options_for(count=None), journal) == 2 * 2 * 3
    other = journals("other")
    with pytest.raises(ConfigError, match=r"only 0 of 1 prompts have 24 tokens .*: nothing to measure"):
        take(other, TextClient([20]), draft=False, count=None)


def test_a_shorter_repeat_cuts_a_text_earlier(journals: Any) -> None:
    class Repeating(TextClient):
        async def complete(self, prompt: str, max_tokens: int, on_text: Any) -> Completion:
            ids = (*range(30), *range(10), *range(100, 140))  # ten tokens come again
            return Completion((0,), ids, "", 0.0, 1.0, None, tuple((1.0 * place, 1) for place in range(len(ids))))

    for name, span, cut in (("sixteen", 16, 80), ("eight", 8, 30)):
        journal = journals(name)
        take(journal, Repeating([0]), draft=False, count=1, repeat_span=span)
        assert len(journal.references[0].expected) == cut


def test_whole_texts_are_used_however_short_they_are(journals: Any) -> None:
    journal = journals()
    take(journal, TextClient([3, 4]), draft=False, count=2, whole_texts=True)
    assert [len(one.expected) for one in usable(journal, options_for(count=2, whole_texts=True))] == [6, 8]
