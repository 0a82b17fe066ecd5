"""Changes to the code that would make figures lie: each is made in a copy of the package, and the named test must fail.

`make test-all` alone runs this. A row whose old text does not stand there exactly once is behind, and to be renewed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

import vllm_wanspec

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
PACKAGE = Path(vllm_wanspec.__file__).parent
TESTS_FAILED = 1  # pytest's exit code; broken code and wrong names have others
LIMIT_S = 100.0


class Mutation(NamedTuple):
    """``new`` in place of ``old`` in a file of the package, and the test in ``tests/unit`` that must fail then."""

    file: str
    old: str
    new: str
    test: str


FALLBACK_EMPTIED = (
    Mutation(
        "config/settings.py",
        'Field(strict=False)] = ("ngram",)',
        "Field(strict=False)] = ()",
        "config/test_settings.py::test_the_least_that_works",
    ),
    Mutation(
        "lab/harness/launch.py",
        '"metrics": {"port": metrics_port},',
        '"metrics": {"port": metrics_port}, "fallback": [],',
        "lab/compare/test_plan.py::test_remote_arms_differ_in_their_drafter_and_its_rule",
    ),
    Mutation(
        "controller/drafting.py",
        '"ngram" in settings.fallback',
        "False",
        "controller/test_drafting_lookup.py::test_without_a_drafter_the_text_itself_is_looked_up",
    ),
    Mutation(
        "controller/drafting.py",
        "            self._look_up(batch, plan, now)\n",
        "            pass\n",
        "controller/test_drafting_lookup.py::test_without_a_drafter_the_text_itself_is_looked_up",
    ),
)
CO_LOCATED_NOT_PACED = (
    Mutation(
        "emulate/pacing.py",
        "    install_draft(pacer)\n    return pacer",
        "    return pacer",
        "emulate/test_pacing.py::test_the_environment_asks_for_both_forwards",
    ),
    Mutation(
        "emulate/pacing.py",
        "Pacing.parse(draft_setting, DRAFT_PACING_ENV) if draft_setting else COUNT_ONLY",
        "COUNT_ONLY",
        "emulate/test_pacing.py::test_the_environment_asks_for_both_forwards",
    ),
    Mutation(
        "emulate/pacing.py",
        "self._run(forward, self.draft_pacing.step_ms(tokens), ",
        "self._run(forward, 0.0, ",
        "emulate/test_pacing.py::test_a_draft_model_beside_the_target_is_stretched_to_its_own_pace",
    ),
    Mutation(
        "lab/compare/lineup.py",
        "{} if options.draft_forward is None else {DRAFT_PACING_ENV",
        "{} if True else {DRAFT_PACING_ENV",
        "lab/compare/test_plan.py::test_both_models_of_a_co_located_arm_are_paced",
    ),
    Mutation(
        "lab/compare/lineup.py",
        "pacing | dict(env or {})",
        "dict(env or pacing)",
        "lab/compare/test_plan.py::test_both_models_of_a_co_located_arm_are_paced",
    ),
    Mutation(
        "lab/target/capacity_plan.py",
        "            env = {DRAFT_PACING_ENV: paced.draft.setting}\n",
        "",
        "lab/target/test_capacity.py::test_what_is_started",
    ),
    Mutation(
        "lab/compare/result.py",
        "            if pace is not None and arm.is_colocated and ",
        "            if False and ",
        "lab/compare/test_figures.py::test_a_draft_model_that_is_not_paced_makes_a_run_invalid",
    ),
    Mutation(
        "plugin.py",
        "        pacing.install_from_env()\n",
        "        pass\n",
        "test_plugin.py::test_pacing_is_imported_where_one_of_its_variables_is_set",
    ),
    Mutation(
        "lab/compare/plan.py",
        "self.draft_pace and self.draft_pace.scaled(self.time_scale)",
        "self.draft_pace",
        "lab/compare/test_plan.py::test_a_time_scale_stretches_every_pace_alike",
    ),
    Mutation(
        "cli/bench.py",
        'Pacing.parse(draft_pace, "--draft-pace") if pace else None',
        "None",
        "lab/compare/test_run.py::test_the_command_measures",
    ),
)
PROXY_DELAYS_THREE_QUARTERS = (
    Mutation(
        "emulate/wan_settings.py",
        "(self.rtt_ms / 2 + rng",
        "(self.rtt_ms * 0.75 + rng",
        "emulate/test_wan_loss.py::test_without_losses_a_chunk_takes_half_a_round_trip_and_draws_nothing_but_jitter",
    ),
    Mutation(
        "emulate/wan.py",
        'self._path.send(len(chunk or b""), sent_s, ',
        'self._path.send(len(chunk or b""), sent_s + proxy.settings.rtt_ms / 4e3, ',
        "emulate/test_wan_delay.py::test_the_round_trip_is_as_long_as_told",
    ),
    Mutation(
        "cli/wan.py",
        "WanSettings(rtt_ms, ",
        "WanSettings(1.5 * rtt_ms, ",
        "cli/test_wan.py::test_options_reach_the_proxy",
    ),
    Mutation(
        "lab/harness/wan_control.py",
        '{"rtt_ms": delay_ms, "jitter_ms"',
        '{"rtt_ms": 1.5 * delay_ms, "jitter_ms"',
        "lab/harness/test_wan_control.py::test_the_round_trip_is_set_once_every_link_has_measured_it",
    ),
)
IDEAL_DELAYS_THREE_QUARTERS = (
    Mutation(
        "core/analysis/ideal.py",
        "_Remote(ranks, rtt_ms / 2.0, ",
        "_Remote(ranks, rtt_ms * 0.75, ",
        "core/analysis/test_ideal.py::test_a_token_outside_the_tree_costs_a_round_trip_of_drafting",
    ),
    Mutation(
        "core/analysis/ideal.py",
        "remote.open(rtt_ms / 2.0 - ",
        "remote.open(rtt_ms * 0.75 - ",
        "core/analysis/test_ideal.py::test_what_follows_a_wrong_token_is_verified_in_vain",
    ),
    Mutation(
        "core/analysis/ideal.py",
        "drafted_ms + self._one_way_ms <= now_ms",
        "drafted_ms + 1.5 * self._one_way_ms <= now_ms",
        "core/analysis/test_ideal.py::test_what_follows_a_wrong_token_is_verified_in_vain",
    ),
    Mutation(
        "core/analysis/ideal.py",
        "told_ms = now_ms + self._one_way_ms",
        "told_ms = now_ms + 1.5 * self._one_way_ms",
        "core/analysis/test_ideal.py::test_a_token_outside_the_tree_costs_a_round_trip_of_drafting",
    ),
    Mutation(
        "lab/compare/ideals.py",
        "rtt_ms=options.emulated_ms(cell.rtt_ms)",
        "rtt_ms=1.5 * options.emulated_ms(cell.rtt_ms)",
        "lab/compare/test_figures.py::test_each_arm_has_its_own_ideal",
    ),
)
LINK_HALVES_ITS_ROUND_TRIP = (
    Mutation(
        "controller/link.py",
        "return self._rtt_s.get(0.0)",
        "return self._rtt_s.get(0.0) / 2.0",
        "controller/test_link.py::test_the_round_trip_is_that_of_the_way",
    ),
    Mutation(
        "controller/link.py",
        "self._took(time.monotonic() - began_s)",
        "self._took((time.monotonic() - began_s) / 2.0)",
        "controller/test_link.py::test_the_round_trip_is_that_of_the_way",
    ),
    Mutation(
        "controller/link.py",
        "self._took(now - sent_s)",
        "self._took((now - sent_s) / 2.0)",
        "controller/test_link.py::test_the_round_trip_is_that_of_the_way",
    ),
    Mutation(
        "controller/link.py",
        "return statistics.median(list(self._trips_s) or [0.0])",
        "return statistics.median(list(self._trips_s) or [0.0]) / 2.0",
        "controller/test_link.py::test_what_waits_behind_a_busy_drafter_is_not_the_path_s",
    ),
    Mutation(
        "controller/metrics.py",
        "[link.name], link.median_rtt_s)",
        "[link.name], link.median_rtt_s / 2.0)",
        "controller/test_metrics.py::test_counters_and_drafters",
    ),
    Mutation(
        "controller/metrics.py",
        "[link.name], link.rtt_s)",
        "[link.name], link.rtt_s / 2.0)",
        "controller/test_metrics.py::test_counters_and_drafters",
    ),
    Mutation(
        "lab/harness/probes.py",
        "1000.0 * max(trips_s)",
        "500.0 * max(trips_s)",
        "lab/harness/test_probes.py::test_the_round_trip_is_the_link_s_own",
    ),
    Mutation(
        "controller/placing.py",
        "lookahead_tokens(link.rtt_s, ",
        "lookahead_tokens(link.rtt_s / 2.0, ",
        "controller/test_pool.py::test_how_far_ahead_is_drafted_goes_by_the_link_s_round_trip",
    ),
    Mutation(
        "core/policy/expansion.py",
        "ceil(rtt_s / step_s)",
        "ceil(rtt_s / 2.0 / step_s)",
        "core/policy/test_expansion.py::test_lookahead_covers_a_round_trip_of_lucky_steps",
    ),
)
WINDOW_IGNORED = (
    Mutation(
        "core/policy/length.py",
        "Plan(limit if window is None else min(limit, window.size))",
        "Plan(limit)",
        "core/policy/test_length.py::test_a_window_binds",
    ),
    Mutation(
        "core/policy/length.py",
        "self.size = 0 if self._off else rounded",
        "self.size = AWC_MAX",
        "core/policy/test_length.py::test_two_rounds_at_the_floor_switch_it_off",
    ),
    Mutation(
        "core/controller.py",
        "            self.window.observe(followed, missed, self._shared.cost)\n",
        "            pass\n",
        "core/test_controller.py::test_a_window_observes_every_commit_that_could_be_predicted",
    ),
    Mutation(
        "controller/drafting.py",
        "self._policy.plan(plan.limit, live.core.window, 0.0) if self.windowed else plan",
        "plan",
        "controller/test_drafting_window.py::test_each_request_has_a_window_of_its_own",
    ),
    Mutation(
        "controller/drafting.py",
        "else tree.draft(own.limit, ",
        "else tree.draft(plan.limit, ",
        "controller/test_drafting_window.py::test_each_request_has_a_window_of_its_own",
    ),
    Mutation(
        "controller/drafting.py",
        "live.core.fall_back(live.draft, own.limit, ",
        "live.core.fall_back(live.draft, plan.limit, ",
        "controller/test_drafting_window.py::test_what_is_looked_up_keeps_within_the_window_too",
    ),
    Mutation(
        "controller/pool.py",
        "Window() if self._drafting.windowed else None",
        "None",
        "controller/test_drafting_window.py::test_each_request_has_a_window_of_its_own",
    ),
    Mutation(
        "controller/pool.py",
        "            self.shared.cost = StepCost.of(self.shared.times)\n",
        "            pass\n",
        "controller/test_drafting_window.py::test_what_a_step_costs_bounds_the_window",
    ),
)
LOOKUP_COUNTED_AS_DRAFTER = (
    Mutation(
        "core/counters.py",
        "            self.accepted_lookup += min(count - drafted, len(draft.guess))\n            count = drafted\n",
        "            count = min(count, drafted + len(draft.guess))\n",
        "core/test_accepted.py::test_a_lookup_alone",
    ),
    Mutation(
        "core/policy/lookup.py",
        "return Draft(drafted, expected + worth, chance, guess, match, branch)",
        "return Draft([*drafted, *guess], expected + worth, chance, branch=branch)",
        "core/test_accepted.py::test_a_lookup_behind_a_draft",
    ),
    Mutation(
        "controller/pool.py",
        "if live.offered and draft.drafted:",
        "if live.offered and draft.tokens:",
        "controller/test_drafting_lookup.py::test_what_looked_up_steps_yield_is_kept_apart_from_what_drafters_give",
    ),
    Mutation(
        "lab/target/colocated.py",
        'counts["accepted_draft"] += min(accepted, drafted)',
        'counts["accepted_draft"] += accepted',
        "lab/target/test_colocated.py::test_accepted_tokens_are_counted_by_where_they_came_from",
    ),
    Mutation(
        "lab/harness/probes.py",
        '"accepted_lookup": "accepted_lookup",',
        '"accepted_lookup": "accepted_draft",',
        "lab/harness/test_probes.py::test_a_co_located_draft_model_with_lookup_tells_whose_its_tokens_were",
    ),
    Mutation(
        "lab/compare/rows.py",
        'useful = sources["accepted_main_line"]',
        "useful = accepted",
        "lab/compare/test_figures.py::test_lookups_tokens_are_not_the_drafters",
    ),
    Mutation(
        "lab/compare/rows.py",
        'if arm.is_remote or arm.target.method == "draft_model_lookup":',
        "if arm.is_remote:",
        "lab/compare/test_figures.py::test_draft_passes_and_tokens_of_each_kind_of_arm",
    ),
    Mutation(
        "lab/compare/rows.py",
        'if arm.target.method == "draft_model":\n        return verified',
        "if arm.is_colocated:\n        return verified",
        "lab/compare/test_figures.py::test_draft_passes_and_tokens_of_each_kind_of_arm",
    ),
    Mutation(
        "lab/compare/report.py",
        '("from main line", lambda row: number(row.accepted_main_line))',
        '("from main line", lambda row: number((row.accepted_main_line or 0.0) + (row.accepted_lookup or 0.0)))',
        "lab/compare/test_report.py::test_who_the_accepted_tokens_came_from_stands_under_their_names",
    ),
)
HEALTH_FORGOTTEN = (
    Mutation(
        "controller/choice.py",
        "_nearest(served, healthy or suspect, now, new=new)",
        "_nearest(served, able, now, new=new)",
        "controller/test_choice.py::test_a_healthy_drafter_is_preferred_however_far",
    ),
    Mutation(
        "controller/choice.py",
        "if not new and link.health.opening >= OPENING:",
        "if False:",
        "controller/test_placing.py::test_only_so_many_sessions_at_once_wait_for_their_first_draft_where_they_move",
    ),
    Mutation(
        "controller/placing.py",
        "if now - live.due_s < patience_s:",
        "if True:",
        "controller/test_placing.py::test_sessions_move_from_a_drafter_that_drafts_nothing_and_one_line_says_so",
    ),
    Mutation(
        "controller/pool.py",
        "                if not self._drafting.withheld:",
        "                if True:",
        "controller/test_placing.py::test_steps_whose_drafts_are_not_wanted_say_nothing_of_a_drafter",
    ),
    Mutation(
        "core/health.py",
        "if self.added < LEAST_USE:",
        "if False:",
        "controller/test_placing.py::test_what_drafts_too_late_for_any_use_loses_its_sessions",
    ),
    Mutation(
        "core/health.py",
        "min(MAX_PROBE_S, 2.0 * self._wait_s)",
        "self._wait_s",
        "controller/test_placing.py::test_a_broken_drafter_gets_ever_fewer_probes_and_all_sessions_when_it_is_well_again",
    ),
    Mutation(
        "controller/link.py",
        "self._pings.pop(pong.number, None)",
        "self._pings.get(pong.number)",
        "controller/test_link.py::test_a_pong_answers_one_ping_of_ours",
    ),
)
MUTATIONS = {
    "the default fallback emptied": FALLBACK_EMPTIED,
    "the co-located draft model not paced": CO_LOCATED_NOT_PACED,
    "the proxy delays three quarters of R each way": PROXY_DELAYS_THREE_QUARTERS,
    "the ideal does the same": IDEAL_DELAYS_THREE_QUARTERS,
    "the link halves its R": LINK_HALVES_ITS_ROUND_TRIP,
    "AWC's window ignored": WINDOW_IGNORED,
    "lookup's tokens counted as the drafter's": LOOKUP_COUNTED_AS_DRAFTER,
    "what is known of drafters forgotten": HEALTH_FORGOTTEN,
}
ROWS = [
    pytest.param(row, id=f"{what}: {row.file} {number}")
    for what, rows in MUTATIONS.items()
    for number, row in enumerate(rows, 1)
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, in a folder of its own."""
    return Path(shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")))


def run_tests(package: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Run tests of the checkout against a copy of the package."""
    # Safe path: what tests start must not import the package from the folder that they are started in.
    env = os.environ | {"PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    names = [f"tests/unit/{test}" for test in tests]
    argv = [sys.executable, "-m", "pytest", "--quiet", "--tb=line", "-p", "no:cacheprovider", *names]
    return subprocess.run(argv, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.parametrize("row", ROWS)
def test_a_change_is_caught(row: Mutation, package: Path) -> None:
    path = package / row.file
    code = path.read_text("utf-8")
    assert code.count(row.old) == 1, f"the table is behind {row.file}: its old text is not there exactly once"
    path.write_text(code.replace(row.old, row.new), "utf-8")
    done = run_tests(package, [row.test])
    assert f"FAILED tests/unit/{row.test}" in done.stdout, done.stdout + done.stderr
    assert done.returncode == TESTS_FAILED, done.stdout + done.stderr


def test_without_a_change_none_of_them_fails(package: Path) -> None:
    done = run_tests(package, sorted({row.test for rows in MUTATIONS.values() for row in rows}))
    assert done.returncode == 0, done.stdout + done.stderr
