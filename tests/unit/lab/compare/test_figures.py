"""The side-by-side bench's figures on invented runs, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from compare_runs import TIMES_MS, batch, full_run, options, provenance, reference, request

from vllm_wanspec.core.analysis.ideal import ideal_decode_ms
from vllm_wanspec.lab.compare.figures import Bar, Figures, figures
from vllm_wanspec.lab.compare.result import Result
from vllm_wanspec.lab.compare.rows import Row
from vllm_wanspec.lab.harness.counters import Counters
from vllm_wanspec.lab.harness.pacing_counts import Paced
from vllm_wanspec.lab.records import Batch, Cell

NONE = Cell("none", None, 1)
CONSTRAINED = Cell("none_constrained", None, 1)
DRAFT_MODEL = Cell("draft_model", None, 1)
WANSPEC = Cell("wanspec", 30.0, 1)


def run_of(*batches: Batch, **changes: Any) -> Result:
    fields: dict[str, Any] = {"options": options(), "taken": [reference(0), reference(1)], "gamma": 3}
    fields |= {"trials": [], "batches": batches, "paced": {}, "provenance": provenance()}
    return Result(**(fields | changes))


def row_of(run: Result, cell: Cell) -> Row:
    row = figures(run).row(*cell)
    assert row is not None
    return row


def bar_of(found: Figures, text: str) -> Bar:
    return next(bar for bar in found.bars if text in bar.text)


def test_a_row_by_hand() -> None:
    counters = {"num_draft_tokens": 50.0, "num_accepted_tokens": 20.0, "drafted_tokens": 200.0, "sent_bytes": 220.0}
    counters |= {"received_bytes": 2200.0, "waits": 3.0, "wait_seconds": 0.25, "local_draft_passes": 0.0}
    cpu_s = {"target": 0.5, "drafter": 1.0}
    row = row_of(
        run_of(
            batch(
                WANSPEC,
                [request(0, 100.0, 10, 4, 50.0)],
                0,
                counters=counters,
                cpu_s=cpu_s,
                seconds=0.15,
                ties=("m: at 2",),
            ),
            batch(WANSPEC, [request(1, 600.0, 30, 12, 70.0)], 0, counters=counters, cpu_s=cpu_s, seconds=0.65),
            batch(WANSPEC, [request(0, 300.0, 10, 4, 60.0)], 1, counters=counters, cpu_s=cpu_s, seconds=0.4),
        ),
        WANSPEC,
    )
    assert (row.requests, row.tokens, row.gamma) == (3, 50, None)
    assert row.tpot_ms == 20.0  # 1000 ms for 50 tokens
    assert row.median_tpot_ms == 20.0  # 400 / 20 and 600 / 30
    assert row.ttft_ms == 60.0
    assert row.throughput_tok_s == pytest.approx(53 / 1.2)
    assert row.throughput_runs == pytest.approx((42 / 0.8, 11 / 0.4))
    assert row.tokens_per_step == 2.5
    assert row.acceptance == 0.4
    assert (row.drafted, row.wasted) == (600.0, 540.0)
    assert row.bytes_up_per_token == pytest.approx(660 / 53)
    assert row.bytes_down_per_token == pytest.approx(6600 / 53)
    assert (row.waits, row.wait_s) == (9.0, 0.75)
    assert (row.cpu_target, row.cpu_drafter) == pytest.approx((1.25, 2.5))
    assert (row.local_draft_passes, row.ties, row.wrong) == (0.0, 1, 0)
    assert row.to_draft_model is None and row.to_none is None and row.to_constrained is None


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
    )
    row = row_of(run, WANSPEC)
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


def test_draft_passes_on_the_targets_side() -> None:
    drafts = {"num_drafts": 20.0, "num_draft_tokens": 55.0, "num_accepted_tokens": 30.0}
    both = [request(0, 900.0, ttft_ms=100.0), request(1, 700.0, ttft_ms=100.0)]
    run = run_of(
        batch(DRAFT_MODEL, [request(0, 100.0)], counters=drafts),
        batch(Cell("draft_model", None, 8), both, counters=drafts, seconds=1.2),
        batch(Cell("ngram", None, 1), [request(0, 100.0)], counters=drafts),
    )
    alone = row_of(run, DRAFT_MODEL)
    assert (alone.local_draft_passes, alone.passes_estimated, alone.gamma) == (60.0, False, 3)
    assert (alone.drafted, alone.wasted) == (55.0, 25.0)
    several = row_of(run, Cell("draft_model", None, 8))
    assert several.local_draft_passes == pytest.approx(60 / 1.5)  # 1.8 s of requests in 1.2 s
    assert several.passes_estimated
    ngram = row_of(run, Cell("ngram", None, 1))
    assert (ngram.local_draft_passes, ngram.drafted, ngram.gamma) == (0.0, None, None)
    assert row_of(replace(run, gamma=None), DRAFT_MODEL).local_draft_passes is None


def test_plain_decoding_stands_in_for_the_constrained_one_above_one_stream_only() -> None:
    cells = (NONE, WANSPEC, Cell("none", None, 8), Cell("wanspec", 30.0, 8))
    run = run_of(*(batch(cell, [request(0, 100.0 if cell.arm == "none" else 50.0)]) for cell in cells))
    assert row_of(run, WANSPEC).to_constrained is None
    assert row_of(run, Cell("wanspec", 30.0, 8)).to_constrained == (0.5, 0.5, 0.5)


def test_the_ideal_is_that_of_the_measured_prompts() -> None:
    references = [reference(0), reference(1, (0, None, 0, None, 1) * 6), reference(2, (None,) * 30)]
    run = run_of(
        batch(WANSPEC, [request(0, 780.0)]),
        batch(WANSPEC, [request(1, 870.0, 29)]),
        batch(Cell("wanspec", 30.0, 8), [request(0, 780.0)]),
        batch(NONE, [request(0, 780.0)]),
        taken=references,
    )
    made = run.options
    assert made.target_pace is not None and made.draft_pace is not None
    times = {"target_ms": made.target_pace.step_ms, "draft_ms": made.draft_pace.step_ms}
    expected = sum(ideal_decode_ms(one.ranks, 3, rtt_ms=30.0, limit=8, **times) for one in references[:2]) / 68
    row = row_of(run, WANSPEC)
    assert row.to_ideal is not None
    assert row.ideal_tpot_ms == pytest.approx(expected)
    assert row.to_ideal.value == pytest.approx(1650 / 68 / expected)
    assert row.to_ideal.low < row.to_ideal.value < row.to_ideal.high
    assert row_of(run, Cell("wanspec", 30.0, 8)).ideal_tpot_ms is None
    assert row_of(run, NONE).ideal_tpot_ms is None
    unpaced = replace(run, options=options(target_pace=None, draft_pace=None))
    assert row_of(unpaced, WANSPEC).ideal_tpot_ms is None and row_of(unpaced, WANSPEC).to_ideal is None


def test_the_ideal_is_scaled_like_the_run() -> None:
    plain = run_of(batch(WANSPEC, [request(0, 780.0)]), taken=[reference(0, (0, None, 0, None, 1) * 6)])
    ideal_ms = row_of(plain, WANSPEC).ideal_tpot_ms
    assert ideal_ms is not None
    scaled = replace(plain, options=options(time_scale=1.5))
    assert row_of(scaled, WANSPEC).ideal_tpot_ms == pytest.approx(1.5 * ideal_ms)


def test_rows_are_in_the_order_of_the_cells() -> None:
    run = run_of(batch(WANSPEC, [request(0, 9.0)]), batch(NONE, [request(0, 9.0)]))
    assert [row.cell for row in figures(run).rows] == [NONE, WANSPEC]


def test_a_run_that_holds_all_bars() -> None:
    found = figures(full_run())
    assert [bar.text for bar in found.bars if not bar.held] == []
    assert len(found.bars) == 16
    assert (found.held, found.doubts) == (True, ())
    assert full_run().kept_pace() and full_run().wrong == ()
    far = bar_of(found, "÷ plain, R = 500 ms")
    assert far.value == pytest.approx(35.5 / 36.6, rel=0.02)
    assert far.upper is not None and far.value is not None and far.upper > far.value


@pytest.mark.parametrize(
    ("rtt_ms", "pace_ms", "text"),
    [
        (0.0, 17.6, "÷ draft_model, R = 0 ms"),
        (10.0, 17.6, "÷ draft_model, R = 10 ms"),
        (20.0, 19.0, "÷ draft_model, R = 20 ms"),
        (30.0, 20.2, "÷ draft_model, R = 30 ms"),
        (50.0, 22.5, "÷ draft_model, R = 50 ms"),
        (20.0, 18.2 * 1.15, "÷ ideal"),
        (30.0, 20.0, "÷ none_constrained, R = 30 ms"),
        (100.0, 29.0, "÷ none_constrained, R = 100 ms"),
        (500.0, 37.2, "÷ plain, R = 500 ms"),
        (500.0, 37.2, "÷ plain, worst"),
        (30.0, 22.4, "throughput"),
    ],
)
def test_a_slow_row_misses_its_bar(rtt_ms: float, pace_ms: float, text: str) -> None:
    found = figures(full_run(times_ms=TIMES_MS | {rtt_ms: pace_ms}))
    assert bar_of(found, text).held is False
    assert found.held is False


def test_a_bar_is_about_the_upper_end_of_the_interval() -> None:
    bar = bar_of(figures(full_run(times_ms=TIMES_MS | {30.0: 19.9})), "÷ none_constrained, R = 30 ms")
    assert bar.value is not None and bar.upper is not None
    assert bar.value < bar.limit < bar.upper
    assert bar.held is False


def test_the_stretch_goal_does_not_count() -> None:
    found = figures(full_run(times_ms=TIMES_MS | {70.0: 23.0}))
    assert bar_of(found, "R = 70 ms").held is False
    assert found.held is True


def changed(cell: Cell, **counters: float) -> Result:
    run = full_run()

    def counting(one: Batch) -> Batch:
        return replace(one, counters=Counters({**one.counters.values, **counters}))

    return replace(run, batches=[counting(one) if one.cell == cell else one for one in run.batches])


@pytest.mark.parametrize("concurrency", [1, 8])
def test_one_local_pass_is_too_many(concurrency: int) -> None:
    found = figures(changed(Cell("wanspec", 30.0, concurrency), local_draft_passes=1.0))
    missed = [bar for bar in found.bars if bar.held is False]
    assert [bar.value for bar in missed] == [72.0 if concurrency == 1 else 3.0]
    assert ("single stream" if concurrency == 1 else "8 streams") in missed[0].text


@pytest.mark.parametrize("cell", [Cell("wanspec_dead", None, 1), Cell("wanspec_random", None, 1)])
def test_a_useless_drafter_that_costs_too_much_is_missed_twice(cell: Cell) -> None:
    run = full_run()
    slow = [replace(b, requests=(replace(b.requests[0], time_ms=b.requests[0].time_ms * 1.03),)) for b in of(run, cell)]
    found = figures(replace(run, batches=[b for b in run.batches if b.cell != cell] + slow))
    assert sum(bar.held is False for bar in found.bars) == 2


def of(run: Result, cell: Cell) -> Sequence[Batch]:
    return [one for one in run.batches if one.cell == cell]


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"ended_by": "interrupted"}, "end"),
        ({"prompts": 23}, "fewer than 24 prompts"),
        ({"options": options(repeats=2)}, "fewer than 3 repeats"),
        ({"options": options(target_pace=None)}, "not paced"),
        ({"paced": {"wanspec": Paced(1000, 1), "drafter": Paced(1000, 11)}}, "pace"),
        ({"paced": {}}, "pace"),
    ],
)
def test_a_run_that_cannot_tell_judges_nothing(changes: dict[str, Any], doubt: str) -> None:
    found = figures(full_run(**changes))
    assert len(found.doubts) == 1 and doubt in found.doubts[0]
    assert {bar.held for bar in found.bars} == {None}
    assert found.held is None
    assert bar_of(found, "÷ draft_model, R = 30 ms").value is not None


def test_overruns_make_a_paced_run_invalid() -> None:
    assert full_run(paced={"drafter": Paced(1000, 10)}).kept_pace()
    assert not full_run(paced={"drafter": Paced(1000, 11)}).kept_pace()
    assert not full_run(paced={}).kept_pace()
    assert full_run(paced={}, options=options(target_pace=None)).kept_pace()


def test_a_wrong_output_is_counted_and_named() -> None:
    run = full_run()
    first = replace(run.batches[0], wrong=("module0: token 3 differs",))
    run = replace(run, batches=[first, *run.batches[1:]])
    found = figures(run)
    assert run.wrong == ("none: module0: token 3 differs",)
    assert found.rows[0].wrong == 1
    assert found.held is None


def test_missing_rows_leave_their_bars_open() -> None:
    run = full_run(options=options(arms=("draft_model", "none_constrained", "wanspec"), concurrency=(1,)))
    found = figures(run)
    assert [bar.text for bar in found.bars if bar.held is None] == [
        "÷ plain, drafter dead",
        "÷ plain, drafter sends random tokens",
        "draft_model's throughput ÷ wanspec's, 8 streams, R = 30 ms",
        "local draft passes, 8 streams, R = 30 ms",
    ]
    assert found.held is None
    fewer = figures(full_run(options=options(rtt_ms=(0.0, 10.0, 20.0, 30.0))))
    assert bar_of(fewer, "÷ ideal").held is None  # R = 50 ms is one of those it is about


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


def test_a_run_without_anything_has_no_rows() -> None:
    found = figures(run_of(taken=[]))
    assert found.rows == ()
    assert {bar.value for bar in found.bars} == {None}
