"""The side-by-side bench's figures on invented runs, against values worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from compare_runs import FAR_MS, TIMES_MS, batch, full_run, options, provenance, records, reference, request, servings

from vllm_wanspec.core.analysis.ideal import (
    TextLookup,
    Width,
    colocated_decode_ms,
    ideal_decode_ms,
    lookup_decode_ms,
    oracle_decode_ms,
)
from vllm_wanspec.lab.compare.figures import Bar, Figures, figures, kind_rows
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.rows import Row
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.records import Batch, Cell, Load, Reference, Request, Setting, Trial

NONE = Cell("none", None, 1)
CONSTRAINED = Cell("none_constrained", None, 1)
DRAFT_MODEL = Cell("draft_model", None, 1)
BEHIND = Cell("draft_model_lookup", None, 1)
WANSPEC = Cell("wanspec", 30.0, 1)
BARE = Cell("wanspec_no_lookup", 30.0, 1)


def run_of(*batches: Batch, taken: Sequence[Reference] | None = None, **changes: Any) -> Result:
    made = options(gammas=(3,), ngrams=(Setting(8, 2, 4),)) if "options" not in changes else changes.pop("options")
    texts = [reference(0), reference(1)] if taken is None else taken
    found = records(texts, batches, changes.pop("trials", ()), changes.pop("servings", ()))
    return Result(**{"options": made, "records": found, "provenance": provenance()} | changes)


def row_of(run: Result, cell: Cell) -> Row:
    row = figures(run).row(cell.arm, cell.rtt_ms, cell.load)
    assert row is not None
    return row


def bar_of(found: Figures, text: str) -> Bar:
    return next(bar for bar in found.bars if text in bar.text)


def test_a_row_by_hand() -> None:
    counters = {"num_draft_tokens": 50.0, "num_accepted_tokens": 20.0, "drafted_tokens": 200.0, "sent_bytes": 220.0}
    counters |= {"received_bytes": 2200.0, "waits": 3.0, "wait_seconds": 0.25, "local_draft_passes": 0.0}
    counters |= {"accepted_main_line": 12.0, "accepted_branch": 3.0, "accepted_lookup": 5.0}
    counters |= {"target_forwards": 50.0, "target_overruns": 1.0, "drafter_forwards": 100.0, "drafter_overruns": 0.0}
    more: dict[str, Any] = {"counters": counters, "cpu_s": {"target": 0.5, "drafter": 1.0}}
    row = row_of(
        run_of(
            batch(WANSPEC, [request(0, 100.0, 10, 4, 50.0)], 0, seconds=0.15, ties=("m: at 2",), rtt_ms=30.4, **more),
            batch(WANSPEC, [request(1, 600.0, 30, 12, 70.0)], 0, seconds=0.65, rtt_ms=30.2, **more),
            batch(WANSPEC, [request(0, 300.0, 10, 4, 60.0)], 1, seconds=0.4, rtt_ms=33.0, **more),
        ),
        WANSPEC,
    )
    assert (row.requests, row.tokens, row.gamma, row.setting) == (3, 50, None, None)
    assert row.measured_rtt_ms == 30.4
    assert row.tpot_ms == 20.0  # 1000 ms for 50 tokens
    assert row.median_tpot_ms == 20.0  # 400 / 20 and 600 / 30
    assert row.ttft_ms == 60.0
    assert row.throughput_tok_s == pytest.approx(53 / 1.2)
    assert row.throughput_runs == pytest.approx((42 / 0.8, 11 / 0.4))
    assert row.tokens_per_step == 2.5
    assert row.acceptance == 0.4
    assert (row.accepted_main_line, row.accepted_branch, row.accepted_lookup) == (36.0, 9.0, 15.0)
    assert (row.drafted, row.wasted) == (600.0, 555.0)  # lookup's 15 are not the drafter's
    assert row.bytes_up_per_token == pytest.approx(660 / 53)
    assert row.bytes_down_per_token == pytest.approx(6600 / 53)
    assert (row.waits, row.wait_s) == (9.0, 0.75)
    assert (row.cpu_target, row.cpu_drafter) == pytest.approx((1.25, 2.5))
    assert (row.target_overruns, row.drafter_overruns) == (0.02, 0.0)
    assert (row.local_draft_passes, row.ties, row.wrong) == (0.0, 1, 0)
    assert row.to_draft_model is None and row.to_none is None and row.to_constrained is None


def test_times_between_tokens_by_hand() -> None:
    # Gaps of 10, 20, 0, 0 and of 30, 40 ms: rising 0, 0, 10, 20, 30, 40.
    first = Request(0, ((50.0, 1), (60.0, 1), (80.0, 3)))
    second = Request(1, ((50.0, 1), (80.0, 1), (120.0, 1)))
    row = row_of(run_of(batch(WANSPEC, [first]), batch(WANSPEC, [second])), WANSPEC)
    assert list(row.gaps_ms) == [0.0, 0.0, 10.0, 20.0, 30.0, 40.0]
    assert (row.p50_ms, row.p95_ms, row.p99_ms) == (10.0, 40.0, 40.0)
    only = row_of(run_of(batch(WANSPEC, [Request(0, ((50.0, 1),))])), WANSPEC)
    assert (only.p50_ms, only.tpot_ms) == (None, None)


def test_ratios_are_of_sums_over_prompts() -> None:
    run = run_of(
        batch(WANSPEC, [request(0, 100.0, 10)]),
        batch(WANSPEC, [request(1, 300.0, 10)]),
        batch(DRAFT_MODEL, [request(0, 200.0, 10)]),
        batch(DRAFT_MODEL, [request(1, 300.0, 10)]),
        batch(CONSTRAINED, [request(0, 500.0, 10)]),
        batch(CONSTRAINED, [request(1, 500.0, 10)]),
        batch(NONE, [request(0, 400.0, 10)]),
        batch(NONE, [request(1, 400.0, 10)]),
        batch(BEHIND, [request(0, 100.0, 10)]),
        batch(BEHIND, [request(1, 100.0, 10)]),
    )
    row = row_of(run, WANSPEC)
    assert row.to_draft_model_lookup is not None and row.to_draft_model_lookup.value == pytest.approx(2.0)
    assert row.to_draft_model == pytest.approx((0.8, 0.5, 1.0))  # two prompts: both of one kind is within 95 %
    assert row.to_constrained is not None and row.to_constrained.value == pytest.approx(0.4)
    assert row.to_none is not None and row.to_none.value == pytest.approx(0.5)
    assert row_of(run, DRAFT_MODEL).to_draft_model == (1.0, 1.0, 1.0)


def test_only_what_both_arms_have_been_through_is_paired() -> None:
    run = run_of(
        batch(WANSPEC, [request(0, 100.0, 10)], 0),
        batch(WANSPEC, [request(0, 9000.0, 10)], 1),  # the other arm was not yet there
        batch(WANSPEC, [request(1, 9000.0, 10)], 0),
        batch(DRAFT_MODEL, [request(0, 200.0, 10)], 0),
    )
    assert row_of(run, WANSPEC).to_draft_model == (0.5, 0.5, 0.5)


def test_a_counter_that_one_batch_does_not_know_is_unknown() -> None:
    known = {"local_draft_passes": 0.0, "waits": 1.0}
    run = run_of(
        batch(WANSPEC, [request(0, 100.0)], counters=known), batch(WANSPEC, [request(1, 100.0)], counters={"waits": 2})
    )
    row = row_of(run, WANSPEC)
    assert row.local_draft_passes is None
    assert row.waits == 3.0
    assert row.acceptance is None and row.drafted is None and row.cpu_target is None


def test_draft_passes_and_tokens_of_each_kind_of_arm() -> None:
    drafts = {"num_drafts": 20.0, "num_draft_tokens": 55.0, "num_accepted_tokens": 30.0, "local_draft_passes": 63.0}
    both = [request(0, 900.0, ttft_ms=100.0), request(1, 700.0, ttft_ms=100.0)]
    behind = drafts | {"accepted_main_line": 22.0, "accepted_branch": 0.0, "accepted_lookup": 8.0}
    run = run_of(
        batch(DRAFT_MODEL, [request(0, 100.0)], counters=drafts),
        batch(Cell("draft_model", None, 8), both, counters=drafts, seconds=1.2),
        batch(BEHIND, [request(0, 100.0)], counters=behind | {"drafted_tokens": 40.0}),
        batch(Cell("ngram", None, 1), [request(0, 100.0)], counters=drafts | {"local_draft_passes": 0.0}),
    )
    alone = row_of(run, DRAFT_MODEL)
    assert (alone.local_draft_passes, alone.gamma) == (63.0, 3)  # counted, not reckoned
    assert (alone.drafted, alone.wasted) == (55.0, 25.0)
    assert (alone.accepted_main_line, alone.accepted_lookup) == (30.0, None)
    assert row_of(run, Cell("draft_model", None, 8)).local_draft_passes == 63.0
    with_lookup = row_of(run, BEHIND)
    assert (with_lookup.drafted, with_lookup.wasted, with_lookup.gamma) == (40.0, 18.0, 3)
    assert (with_lookup.accepted_main_line, with_lookup.accepted_lookup) == (22.0, 8.0)
    ngram = row_of(run, Cell("ngram", None, 1))
    assert (ngram.local_draft_passes, ngram.drafted, ngram.gamma) == (0.0, None, None)
    assert (ngram.accepted_main_line, ngram.accepted_lookup) == (None, 30.0)


def test_lookups_tokens_are_not_the_drafters() -> None:
    """What lookup found must not make a drafter look better: it is neither drafted nor saved from the waste."""
    counters = {"drafted_tokens": 100.0, "num_accepted_tokens": 60.0, "accepted_main_line": 10.0}
    counters |= {"accepted_branch": 0.0, "accepted_lookup": 50.0}
    row = row_of(run_of(batch(WANSPEC, [request(0, 100.0)], counters=counters)), WANSPEC)
    assert (row.drafted, row.wasted) == (100.0, 90.0)


@pytest.mark.parametrize(("ahead", "stands_in"), [(False, True), (True, False), (None, False)])
def test_plain_decoding_stands_in_for_the_constrained_one_if_it_is_seen_to_be_the_same(
    ahead: bool | None, stands_in: bool
) -> None:
    cells = (NONE, WANSPEC, Cell("none", None, 8), Cell("wanspec", 30.0, 8))
    made = options()
    known = [replace(one, facts={"observed": {"async_scheduling": ahead}}) for one in servings(made)]
    batches = [batch(cell, [request(0, 100.0 if cell.arm == "none" else 50.0)]) for cell in cells]
    run = run_of(*batches, options=made, servings=known)
    for cell in (WANSPEC, Cell("wanspec", 30.0, 8)):
        assert (row_of(run, cell).to_constrained == (0.5, 0.5, 0.5)) is stands_in
    with_it = run_of(*batches, batch(CONSTRAINED, [request(0, 200.0)]), options=made, servings=known)
    assert row_of(with_it, WANSPEC).to_constrained == (0.25, 0.25, 0.25)


def test_each_arm_has_its_own_ideal() -> None:
    text = reference(0, (0, None, 0, 1, 0) * 6)
    words = random.Random(3)  # from a few, so that some come again
    text = replace(text, expected=tuple(words.choices(range(9), k=30)), prompt_ids=(9, 1, 2, 3))
    arms = ("none", "lookup", "draft_model", "draft_model_lookup", "oracle", "ngram")
    cells = [WANSPEC, BARE, *(Cell(arm, None) for arm in arms), Cell("wanspec", 30.0, 8)]
    run = run_of(*(batch(cell, [request(0, 870.0, 29)]) for cell in cells), taken=[text])
    target, draft = run.options.target_pace, run.options.draft_pace
    assert target is not None and draft is not None
    paces: dict[str, Any] = {"target_ms": target.step_ms, "draft_ms": draft.step_ms}
    lookup = TextLookup(text.prompt_ids, text.expected)
    remote = {"rtt_ms": 30.0, "limit": 8, **paces}
    wanted = {
        "wanspec": ideal_decode_ms(text.ranks, 4, lookup=lookup, **remote),
        "wanspec_no_lookup": ideal_decode_ms(text.ranks, 4, **remote),
        "none": 29 * target.step_ms(1),
        "lookup": lookup_decode_ms(lookup, target_ms=target.step_ms, limit=8),
        "draft_model": colocated_decode_ms(text.ranks, gamma=3, limit=8, **paces),
        "draft_model_lookup": colocated_decode_ms(text.ranks, gamma=3, limit=8, lookup=lookup, **paces),
        "oracle": oracle_decode_ms(30, target_ms=target.step_ms, limit=8),
    }
    assert len(set(wanted.values())) == len(wanted)
    for arm, time_ms in wanted.items():
        row = row_of(run, next(cell for cell in cells if cell.arm == arm))
        assert row.ideal_tpot_ms == pytest.approx(time_ms / 29), arm
        assert row.to_ideal is not None and row.to_ideal.value == pytest.approx(870 / time_ms), arm
        if not arm.startswith("wanspec"):
            assert row.ideal_width_tpot_ms == row.ideal_tpot_ms
    as_wide = ideal_decode_ms(text.ranks, 4, lookup=lookup, width=Width(4, 16, 8), **remote)
    assert row_of(run, WANSPEC).ideal_width_tpot_ms == pytest.approx(as_wide / 29)
    assert as_wide != wanted["wanspec"]
    assert row_of(run, Cell("ngram", None)).ideal_tpot_ms is None  # vLLM's own lookup is not ours
    assert row_of(run, Cell("wanspec", 30.0, 8)).ideal_tpot_ms is None
    unpaced = replace(run, options=options(gammas=(3,), target_pace=None, draft_pace=None))
    assert row_of(unpaced, WANSPEC).ideal_tpot_ms is None and row_of(unpaced, WANSPEC).to_ideal is None


def test_the_ideal_is_that_of_the_measured_prompts() -> None:
    references = [reference(0), reference(1, (0, None, 0, None, 1) * 6), reference(2, (None,) * 30)]
    batches = batch(BARE, [request(0, 780.0)]), batch(BARE, [request(1, 870.0, 29)])
    run = run_of(*batches, taken=references)
    made = run.options
    assert made.target_pace is not None and made.draft_pace is not None
    times: dict[str, Any] = {"target_ms": made.target_pace.step_ms, "draft_ms": made.draft_pace.step_ms}
    expected = sum(ideal_decode_ms(one.ranks, 3, rtt_ms=30.0, limit=8, **times) for one in references[:2]) / 68
    row = row_of(run, BARE)
    assert row.to_ideal is not None
    assert row.ideal_tpot_ms == pytest.approx(expected)
    assert row.to_ideal.value == pytest.approx(1650 / 68 / expected)
    assert row.to_ideal.low < row.to_ideal.value < row.to_ideal.high


def test_sampled_texts_have_no_ideal() -> None:
    """Ranks are those of the greedy texts."""
    greedy, sampled = (row_of(full_run(options=options(temperature=t)), WANSPEC) for t in (0.0, 0.7))
    assert greedy.ideal_tpot_ms is not None and greedy.to_ideal is not None
    assert (sampled.ideal_tpot_ms, sampled.ideal_width_tpot_ms, sampled.to_ideal) == (None, None, None)


def test_the_ideal_is_scaled_like_the_run() -> None:
    plain = run_of(batch(BARE, [request(0, 780.0)]), taken=[reference(0, (0, None, 0, None, 1) * 6)])
    ideal_ms = row_of(plain, BARE).ideal_tpot_ms
    assert ideal_ms is not None
    scaled = replace(plain, options=options(time_scale=1.5))
    assert row_of(scaled, BARE).ideal_tpot_ms == pytest.approx(1.5 * ideal_ms)


def test_rows_are_in_the_order_of_the_cells() -> None:
    run = run_of(batch(WANSPEC, [request(0, 9.0)]), batch(NONE, [request(0, 9.0)]))
    assert [row.cell for row in figures(run).rows] == [NONE, WANSPEC]


def test_a_run_that_holds_all_bars() -> None:
    found = figures(full_run())
    assert [bar.text for bar in found.bars if not bar.held] == []
    assert len(found.bars) == 4
    assert (found.held, found.doubts) == (True, ())
    assert full_run().faults() == [] and full_run().wrong == ()
    far = bar_of(found, "÷ plain, R = 500 ms")
    assert far.value == pytest.approx(35.5 / 36.6, rel=0.02)
    assert far.upper is not None and far.value is not None and far.upper > far.value


def test_a_drafter_too_far_away_misses_its_bar_by_the_upper_end() -> None:
    found = figures(full_run(times_ms=TIMES_MS | {FAR_MS: 37.2}))
    assert bar_of(found, "R = 500 ms").held is False
    assert found.held is False
    close = bar_of(figures(full_run(times_ms=TIMES_MS | {FAR_MS: 36.6})), "R = 500 ms")
    assert close.value is not None and close.upper is not None
    assert close.value < close.limit < close.upper
    assert close.held is False


def changed(cell: Cell, **counters: float) -> Result:
    run = full_run()

    def counting(one: Batch) -> Batch:
        return replace(one, counters=Counters({**one.counters.values, **counters}))

    return with_batches(run, [counting(one) if one.cell == cell else one for one in run.batches])


def with_batches(run: Result, batches: Sequence[Batch]) -> Result:
    parts = run.records
    made = records(list(parts.references.values()), batches, parts.trials, list(parts.servings.values()))
    return replace(run, records=made)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_one_local_pass_is_too_many(concurrency: int) -> None:
    found = figures(changed(Cell("wanspec", 30.0, concurrency), local_draft_passes=1.0))
    missed = [bar for bar in found.bars if bar.held is False]
    assert [bar.value for bar in missed] == [24.0 if concurrency == 1 else 1.0]
    assert "draft passes on the target's side" in missed[0].text


@pytest.mark.parametrize("cell", [Cell("wanspec_dead", None, 1), Cell("wanspec_random", None, 1)])
def test_a_useless_drafter_that_costs_too_much_misses_its_bar(cell: Cell) -> None:
    run = full_run()
    slow = [replace(b, requests=(request(b.requests[0].prompt, b.requests[0].time_ms * 1.03),)) for b in of(run, cell)]
    found = figures(with_batches(run, [b for b in run.batches if b.cell != cell] + slow))
    assert sum(bar.held is False for bar in found.bars) == 1


def of(run: Result, cell: Cell) -> Sequence[Batch]:
    return [one for one in run.batches if one.cell == cell]


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"ended_by": "interrupted"}, "end"),
        ({"prompts": 23}, "fewer than 24 prompts"),
        ({"options": options(target_pace=None)}, "not paced"),
    ],
)
def test_a_run_that_cannot_tell_judges_nothing(changes: dict[str, Any], doubt: str) -> None:
    found = figures(full_run(**changes))
    assert len(found.doubts) == 1 and doubt in found.doubts[0]
    assert {bar.held for bar in found.bars} == {None}
    assert found.held is None
    assert bar_of(found, "R = 500 ms").value is not None


@pytest.mark.parametrize(("overruns", "faults"), [(1.0, 0), (2.0, 1)])
def test_overruns_make_a_paced_run_invalid(overruns: float, faults: int) -> None:
    run = changed(WANSPEC, drafter_forwards=100.0, drafter_overruns=overruns)
    # 100 forwards of each of 24 prompts at this cell, and as many at 16 others.
    only = with_batches(run, of(run, WANSPEC))
    assert len(only.faults()) == faults
    assert all("of drafter's" in fault for fault in only.faults())
    assert only.faults(["wanspec"]) == []
    assert row_of(only, WANSPEC).drafter_overruns == pytest.approx(overruns / 100)
    assert figures(only).held is None


def test_a_paced_run_whose_forwards_nobody_counted_is_invalid() -> None:
    run = run_of(batch(WANSPEC, [request(0, 100.0)]))
    assert run.faults() == ["it is unknown how many forwards took longer than their pace"]
    assert run_of(batch(WANSPEC, [request(0, 100.0)]), options=options(target_pace=None)).faults() == []


@pytest.mark.parametrize(
    ("measured_ms", "fault"),
    [(30.0, False), (33.4, False), (26.6, False), (33.6, True), (26.4, True), (15.0, True), (45.0, True)],
)
def test_a_round_trip_that_is_not_what_it_should_be_makes_a_run_invalid(measured_ms: float, fault: bool) -> None:
    run = full_run(24)
    off = [replace(one, rtt_ms=measured_ms) if one.cell == WANSPEC else one for one in run.batches]
    faults = with_batches(run, off).faults()
    assert bool(faults) is fault
    assert all(f"wanspec, R = 30 ms: the link measured {measured_ms:.1f} ms" in text for text in faults)


def test_a_cell_whose_round_trip_nobody_measured_makes_a_run_invalid() -> None:
    run = full_run()
    unknown = [replace(one, rtt_ms=None) if one.cell == WANSPEC else one for one in run.batches]
    assert with_batches(run, unknown).faults() == ["wanspec, R = 30 ms: no link measured the round trip"]


@pytest.mark.parametrize(("measured_ms", "fault"), [(15.0, True), (26.4, True), (26.6, False), (90.0, False)])
def test_losses_make_round_trips_longer_and_never_shorter(measured_ms: float, fault: bool) -> None:
    run = full_run(24, options=options(loss=0.01))
    off = [replace(one, rtt_ms=measured_ms) if one.cell == WANSPEC else one for one in run.batches]
    assert bool(with_batches(run, off).faults()) is fault


def test_the_round_trip_is_judged_at_the_time_scale() -> None:
    run = full_run(24, options=options(time_scale=1.5))
    assert run.faults() == []
    off = [replace(one, rtt_ms=30.0) if one.cell == WANSPEC else one for one in run.batches]
    assert "measured 30.0 ms where 45.0 ms were emulated" in with_batches(run, off).faults()[0]


@pytest.mark.parametrize(
    ("counters", "told"),
    [
        ({"local_draft_passes": 0.0}, "0 draft forwards paced to 0.00 ms each"),
        ({"local_draft_paced_ms": 0.0}, "1152 draft forwards paced to 0.00 ms each"),
        ({"local_draft_paced_ms": 48 * 2.5}, "1152 draft forwards paced to 2.50 ms each"),
    ],
)
def test_a_draft_model_that_is_not_paced_makes_a_run_invalid(counters: dict[str, float], told: str) -> None:
    (fault,) = changed(DRAFT_MODEL, **counters).faults()
    assert fault == f"draft_model: {told}, not to 5 ms + 0.02 ms per token"


def test_sources_that_do_not_add_up_make_a_run_invalid() -> None:
    assert changed(WANSPEC, accepted_lookup=5.2).faults() == []
    (fault,) = changed(WANSPEC, accepted_lookup=8.0).faults()
    assert "696 accepted tokens by source, 624 by vLLM's count" in fault


def test_a_wrong_output_is_counted_and_named() -> None:
    run = full_run()
    first = replace(run.batches[0], wrong=("module0: token 3 differs",))
    run = with_batches(run, [first, *run.batches[1:]])
    found = figures(run)
    assert run.wrong == ("none: module0: token 3 differs",)
    assert found.rows[0].wrong == 1
    assert found.held is None


def test_missing_rows_leave_their_bars_open() -> None:
    run = full_run(options=options(arms=("draft_model", "none_constrained", "wanspec"), concurrency=(1,)))
    found = figures(run)
    assert [bar.text for bar in found.bars if bar.held is None] == [
        "without lookup ÷ plain, drafter dead",
        "without lookup ÷ plain, drafter sends random tokens",
        "without lookup ÷ plain, R = 500 ms",
    ]
    assert found.held is None


def test_every_load_has_its_own_setting() -> None:
    run = full_run()
    assert [row_of(run, Cell("draft_model", None, streams)).gamma for streams in (1, 8)] == [4, 3]
    assert row_of(run, Cell("ngram", None)).setting == Setting(8, 2, 4)
    half = [Trial("draft_model", Load(), Setting(2), 20.0)]
    untold = replace(run, records=records(list(run.records.references.values()), run.batches, half))
    assert row_of(untold, DRAFT_MODEL).setting is None


def test_kinds_of_prompts_are_told_apart() -> None:
    run = run_of(
        batch(WANSPEC, [request(0, 100.0, 10)]),
        batch(WANSPEC, [request(1, 300.0, 10)]),
        batch(DRAFT_MODEL, [request(0, 200.0, 10)]),
        batch(DRAFT_MODEL, [request(1, 300.0, 10)]),
        batch(Cell("wanspec", 30.0, 8), [request(0, 300.0, 10)]),
    )
    rows = {(one.row.cell, one.kind): one for one in kind_rows(run, figures(run))}
    assert set(rows) == {(cell, kind) for cell in (WANSPEC, DRAFT_MODEL) for kind in ("code", "prose")}
    code, prose = rows[WANSPEC, "code"], rows[WANSPEC, "prose"]
    assert (code.prompts, code.tpot_ms, code.to_draft_model) == (1, 10.0, (0.5, 0.5, 0.5))
    assert (prose.prompts, prose.tpot_ms, prose.to_draft_model) == (1, 30.0, (1.0, 1.0, 1.0))
    assert prose.to_draft_model_lookup is None
    alike = run_of(batch(WANSPEC, [request(0, 100.0)]), taken=[reference(0), reference(2)])
    assert kind_rows(alike, figures(alike)) == []


def test_goodput_counts_requests_that_were_fast_enough() -> None:
    cell = Cell("wanspec", 30.0, 0, 2.0)
    good = Request(0, ((900.0, 1), (1090.0, 1)))
    late = Request(1, ((1100.0, 1), (1150.0, 1)))
    slow = Request(2, ((100.0, 1), (310.0, 1)))
    made = options(rates=(2.0,), slo_ms=(1000.0, 200.0))
    run = run_of(batch(cell, [good, late, slow], seconds=2.0), options=made)
    assert row_of(run, cell).goodput == pytest.approx(2.0 / 3.0)
    assert row_of(run_of(batch(WANSPEC, [good])), WANSPEC).goodput is None
    lax = run_of(batch(cell, [good, late, slow], seconds=2.0), options=replace(made, time_scale=1.2))
    assert row_of(lax, cell).goodput == 2.0  # all of the rate, however long the last answer took


def test_throughput_is_paired_by_repeat() -> None:
    colocated, remote = Cell("draft_model", None, 8), Cell("wanspec", 30.0, 8)
    one = [request(0, 100.0, 9)]
    run = run_of(
        batch(colocated, one, 0, seconds=1.0),
        batch(colocated, one, 1, seconds=3.0),
        batch(remote, one, 0, seconds=0.8),
        batch(remote, one, 1, seconds=2.8),
        batch(remote, one, 2, seconds=9.0),
    )
    cost = row_of(run, remote).throughput_cost
    assert cost == pytest.approx((0.9, 0.8, 2.8 / 3.0))
    assert row_of(run, remote).throughput_runs == pytest.approx((10 / 0.8, 10 / 2.8, 10 / 9.0))
    assert row_of(run, remote).as_json()["throughput_ci"] == [0.8, 0.9333]
    once = row_of(run_of(*run.batches[0:3:2]), remote).as_json()
    assert (once["throughput_cost"], once["throughput_ci"]) == (0.8, None)  # one repeat says nothing of others


def test_a_run_without_anything_has_no_rows() -> None:
    found = figures(run_of(taken=[]))
    assert found.rows == ()
    assert {bar.value for bar in found.bars} == {None}
