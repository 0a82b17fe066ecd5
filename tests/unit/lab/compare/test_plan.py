"""The side-by-side bench's settings: arms, cells, blocks, and the servers that they need."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_wanspec.config import load_settings
from vllm_wanspec.emulate.pacing import DRAFT_PACING_ENV, PACING_ENV, STATS_ENV, Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.arms import ARMS, Arm, named_arms, tree_arms
from vllm_wanspec.lab.compare.lineup import plan_lineup, server_name, tuned_target
from vllm_wanspec.lab.compare.plan import DEFAULT_ARMS, Options, blocks, cells, orders, read_setting, setting_text
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.options import parse_list
from vllm_wanspec.lab.harness.servers import ServerSpec
from vllm_wanspec.lab.records import Cell, Load, Setting


def options_for(trees: tuple[Arm, ...] = (), **changes: Any) -> Options:
    """Settings with arms by name, and tree arms."""
    settings: dict[str, Any] = {"target": "/big", "draft": "/small", "prompts": Path("/prompts.jsonl")}
    settings |= {"arms": DEFAULT_ARMS, "concurrent_arms": ()} | changes
    settings |= {name: named_arms(f"--{name}", settings[name]) for name in ("arms", "concurrent_arms")}
    return Options(**(settings | {"arms": (*settings["arms"], *trees)}))


def test_only_arms_across_the_wan_are_measured_at_every_round_trip() -> None:
    options = options_for(arms=("none", "wanspec", "wanspec_dead"), rtt_ms=(0.0, 20.0), concurrency=(1,))
    wanted = [("none", None), ("wanspec", 0.0), ("wanspec", 20.0), ("wanspec_dead", None)]
    assert cells(options) == [Cell(arm, rtt_ms, 1) for arm, rtt_ms in wanted]


def test_far_round_trips_are_for_remote_drafts_without_lookup() -> None:
    options = options_for(arms=("none", "wanspec", "wanspec_no_lookup"), rtt_ms=(0.0,), far_rtt_ms=(500.0,))
    wanted = [("none", None), ("wanspec", 0.0), ("wanspec_no_lookup", 0.0), ("wanspec_no_lookup", 500.0)]
    assert cells(options) == [Cell(arm, rtt_ms, 1) for arm, rtt_ms in wanted]


def test_rates_are_loads_of_their_own() -> None:
    options = options_for(arms=(), concurrent_arms=("none", "draft_model"), concurrency=(8,), rates=(2.0, 0.5))
    loads = [(8, None), (0, 2.0), (0, 0.5)]
    assert cells(options) == [Cell(arm, None, *load) for load in loads for arm in ("none", "draft_model")]
    assert options.loads(options.arm("draft_model")) == tuple(Load(*load) for load in loads)


def test_what_the_pre_pass_tries() -> None:
    options = options_for(arms=("none", "ngram", "draft_model", "draft_model_lookup"), gammas=(2, 5))
    tried = {arm.name: options.candidates(arm) for arm in options.started}
    assert tried["none"] == ()
    assert tried["draft_model"] == tried["draft_model_lookup"] == (Setting(2), Setting(5))
    assert Setting(8, 2, 4) in tried["ngram"]
    assert read_setting(setting_text(Setting(8, 2, 4))) == Setting(8, 2, 4)


def test_settings_come_back_from_json() -> None:
    trees = tree_arms("--trees", "wide=running_branches=64; plain=off")
    for options in (
        options_for(trees, concurrency=(1, 8), concurrent_arms=("none",), rates=(2.0,), seed=3),
        options_for(target_pace=None, draft_pace=None, count=None, temperature=0.7),
    ):
        assert Options.of_json(json.loads(json.dumps(options.as_json()))) == options
    with pytest.raises(ConfigError, match="these are not the options of a run"):
        Options.of_json({"target": "x"})


def test_other_arms_and_round_trips_may_run_above_concurrency_1() -> None:
    options = options_for(
        arms=("none",),
        concurrency=(1, 8),
        concurrent_arms=("draft_model", "wanspec_no_wait"),
        concurrent_rtt_ms=(30.0,),
    )
    assert cells(options) == [
        Cell("none", None, 1),
        Cell("draft_model", None, 8),
        Cell("wanspec_no_wait", 30.0, 8),
    ]
    assert [arm.name for arm in options.started] == ["none", "draft_model", "wanspec_no_wait"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"arms": ("nobody",)}, "--arms: 'nobody' is not an arm; there are none, none_constrained"),
        ({"concurrent_arms": ("x",)}, "--concurrent_arms: 'x' is not an arm"),
        ({"rtt_ms": (-1.0,)}, "--rtt-ms: -1 is not from 0 to 10000"),
        ({"rtt_ms": (float("nan"),)}, "--rtt-ms: nan"),
        ({"concurrency": (0,)}, "--concurrency: 0 is not from 1 to 256"),
        ({"gammas": (65,)}, "--gammas: 65 is not from 1 to 64"),
        ({"trees": tree_arms("--trees", "wanspec=off")}, "--trees: the name 'wanspec' is that of an arm of --arms"),
        ({"arms": ("draft_model",), "gammas": ()}, "--gammas: the arm draft_model needs at least one"),
        ({"arms": ("ngram",), "ngrams": ()}, "--ngrams: the arm ngram needs at least one"),
        ({"arms": ("draft_model_lookup",), "gammas": (9,)}, "drafts at most --speculative-tokens per step"),
        ({"rates": (0.0,)}, "--rates: 0 is not from 0.01 to 1000"),
        ({"temperature": -1.0}, "--temperature: -1 is not from 0 to 2"),
        ({"loss": 0.6}, "--loss: 0.6 is not from 0 to 0.5"),
        ({"arms": (), "concurrent_arms": ()}, "--arms: nothing to measure"),
        ({"time_scale": 0.0}, "--time-scale: 0 is not from 0.1 to 20"),
        ({"time_scale": float("nan")}, "--time-scale: nan"),
        ({"time_scale": 2.0, "target_pace": None}, "--time-scale: forwards that are not paced"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        options_for(**changes)


@pytest.mark.parametrize("rtts_ms", [(0.0, 10.0, 20.0), (30.0,)])
def test_every_prompt_goes_through_every_cell_once_in_each_repeat(rtts_ms: tuple[float, ...]) -> None:
    options = options_for(
        arms=tuple(ARMS), rtt_ms=rtts_ms, concurrency=(1, 8), repeats=3, concurrent_arms=("none", "wanspec")
    )
    found = blocks(options)
    seen = Counter(
        (cell, block.repeat, number) for block in found for number, mine in enumerate(orders(block, 5)) for cell in mine
    )
    wanted = [(cell, repeat, number) for cell in cells(options) for repeat in range(3) for number in range(5)]
    assert seen == Counter(dict.fromkeys(wanted, 1))
    assert all(cell.rtt_ms in (None, block.rtt_ms) for block in found for cell in block.cells)
    assert [block.load for block in found] == sorted((block.load for block in found), key=lambda load: load.concurrency)


def test_blocks_are_the_same_at_every_start() -> None:
    assert blocks(options_for(seed=1)) == blocks(options_for(seed=1))
    assert blocks(options_for(seed=1)) != blocks(options_for(seed=2))


def test_arms_without_a_wan_are_measured_in_every_block() -> None:
    """One that ran within a single block would be divided by what was measured up to an hour before or after it."""
    options = options_for(arms=("none", "wanspec_dead", "wanspec"), rtt_ms=(0.0, 10.0), repeats=1)
    found = [[{cell.arm for cell in mine} for mine in orders(block, 4)] for block in blocks(options)]
    every, far = {"none", "wanspec_dead", "wanspec"}, {"wanspec"}
    assert found == [[every, far, far, every], [far, every, every, far]]


def test_a_cell_of_several_streams_is_in_one_block() -> None:
    options = options_for(arms=(), concurrency=(8,), concurrent_rtt_ms=(0.0, 10.0), concurrent_arms=tuple(ARMS))
    found = Counter(cell for block in blocks(options) for cell in block.cells)
    assert found == Counter(dict.fromkeys(cells(options), 1))
    assert all(set(mine) == set(block.cells) for block in blocks(options) for mine in orders(block, 3))


def test_without_a_wan_there_is_one_block() -> None:
    (block,) = blocks(options_for(arms=("none", "ngram", "oracle"), repeats=1))
    assert block.rtt_ms is None
    assert {cell.arm for cell in block.cells} == {"none", "ngram", "oracle"}


def test_every_cell_of_a_block_has_every_place() -> None:
    (block,) = blocks(options_for(arms=("none", "ngram", "oracle"), repeats=1))
    found = orders(block, 6)
    for place in range(3):
        assert Counter(order[place] for order in found) == Counter(dict.fromkeys(block.cells, 2))


def test_lists_are_read_from_text() -> None:
    assert parse_list("--rtt-ms", " 0, 10 ,10,2.5,", float) == (0.0, 10.0, 2.5)
    assert parse_list("--arms", "none,wanspec", str) == ("none", "wanspec")
    with pytest.raises(ConfigError, match="--rtt-ms: '0,x' is not a list of numbers"):
        parse_list("--rtt-ms", "0,x", float)
    with pytest.raises(ConfigError, match="--arms: the list is empty"):
        parse_list("--arms", " ,", str)


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pin_cores", lambda: (0, 1))
    monkeypatch.setattr(machine, "has_gpu", lambda: False)


def following(argv: Any, flag: str) -> str:
    return str(argv[list(argv).index(flag) + 1])


def speculation(spec: ServerSpec) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(following(spec.argv, "--speculative-config"))
    return config


TUNED = {"ngram", "draft_model", "draft_model_lookup"}


def all_specs(options: Options, folder: Path) -> dict[str, ServerSpec]:
    """The targets of a run, those that are tuned with the first of their settings."""
    plans = dict(plan_lineup(options, folder).targets)
    for arm in options.started:
        if arm.is_tuned:
            plans[arm.name] = tuned_target(options, arm, options.candidates(arm)[0], folder)
    return {name: plan.spec for name, plan in plans.items()}


def test_each_arm_gets_the_server_that_it_describes(tmp_path: Path) -> None:
    options = options_for(arms=tuple(ARMS), speculative_tokens=6, gammas=(5,), ngrams=(Setting(7, 1, 3),))
    lineup = plan_lineup(options, tmp_path)
    assert set(lineup.targets) == set(ARMS) - TUNED  # not known yet
    specs = all_specs(options, tmp_path)
    assert "--speculative-config" not in specs["none"].argv
    assert "--no-async-scheduling" not in specs["none"].argv
    assert "--no-async-scheduling" in specs["none_constrained"].argv
    wanted = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    assert speculation(specs["ngram"]) == wanted
    assert speculation(specs["draft_model"]) == {
        "method": "draft_model",
        "model": "/small",
        "num_speculative_tokens": 5,
    }
    assert speculation(specs["draft_model_lookup"])["num_speculative_tokens"] == 6  # the engine's; γ is told by a file
    assert specs["oracle"].env is not None
    assert speculation(specs["oracle"])["model"] == "vllm_wanspec.sim.proposers.OracleProposer"
    assert specs["oracle"].env["WANSPEC_ORACLE"] == str(lineup.oracle_path)
    assert following(specs["wanspec"].argv, "--speculative-tokens") == "6"
    assert all(spec.core == 0 for spec in specs.values())
    ports = [spec.port for spec in (*lineup.sources, *(plan.spec for plan in lineup.targets.values()))]
    assert len(set(ports)) == len(ports)


def test_settings_that_are_told_by_a_file_share_a_server(tmp_path: Path) -> None:
    options = options_for(arms=("draft_model", "draft_model_lookup", "ngram"))
    (stock, behind, ngram) = (options.arm(name) for name in ("draft_model", "draft_model_lookup", "ngram"))
    assert server_name(stock, Setting(3)) == "draft_model-3" != server_name(stock, Setting(4))
    assert server_name(ngram, Setting(8, 2, 4)) == "ngram-8-2-4"
    assert server_name(behind, Setting(3)) == server_name(behind, Setting(4)) == "draft_model_lookup"
    plan = tuned_target(options, behind, Setting(4), tmp_path)
    assert plan.control is not None and json.loads(plan.control.read_text()) == {"gamma": 4}
    assert (plan.spec.env or {})["WANSPEC_LAB_COLOCATED"] == str(plan.control)
    assert tuned_target(options, stock, Setting(4), tmp_path).control is None


def test_what_a_target_runs_with_is_told_without_this_machines_paths(tmp_path: Path) -> None:
    target = str(machine.checkout() / "examples" / "demo_models" / "target")
    options = options_for(arms=("none", "wanspec", "wanspec_no_lookup"), target=target)
    facts = {name: plan.facts() for name, plan in plan_lineup(options, tmp_path).targets.items()}
    assert str(machine.checkout()) not in json.dumps(facts) and str(tmp_path) not in json.dumps(facts)
    assert facts["none"]["settings"] is None
    assert (
        facts["none"]["command"][:2] == ["python", "-m"] and "examples/demo_models/target" in facts["none"]["command"]
    )
    assert facts["none"]["environment"]["WANSPEC_PACING"] == "35.0+0.1"
    settings = {name: facts[name]["settings"] for name in ("wanspec", "wanspec_no_lookup")}
    assert settings["wanspec"]["tree"]["max_branches"] == 4  # defaults are told too
    assert (settings["wanspec"]["fallback"], settings["wanspec_no_lookup"]["fallback"]) == (["ngram"], [])


def test_remote_arms_differ_in_their_drafter_and_its_rule(tmp_path: Path) -> None:
    lineup = plan_lineup(options_for(arms=tuple(ARMS)), tmp_path)
    drafter, wan, useless = lineup.sources
    remote = [name for name, plan in lineup.targets.items() if plan.metrics is not None]
    settings = {arm: load_settings(tmp_path / f"{arm}.yaml") for arm in remote}
    ports = {arm: int(found.draft_endpoints[0].url.rpartition(":")[2]) for arm, found in settings.items()}
    across = ("wanspec", "wanspec_no_lookup", "wanspec_no_wait")
    assert {ports[arm] for arm in across} == {wan.port}
    assert ports["wanspec_random"] == useless.port
    specs = [plan.spec for plan in lineup.targets.values()]
    assert not {ports["wanspec_dead"], ports["lookup"]} & {spec.port for spec in (*lineup.sources, *specs)}
    assert settings["wanspec"].late.policy == "adaptive"
    assert settings["wanspec_no_wait"].late.policy == "none"
    with_lookup = {arm for arm in remote if settings[arm].fallback}
    assert with_lookup == {"wanspec", "wanspec_no_wait", "lookup"}
    assert with_lookup == {arm for arm in remote if ARMS[arm].lookup == "ours"}
    assert "late" not in yaml.safe_load((tmp_path / "wanspec.yaml").read_text())
    assert "fallback" not in yaml.safe_load((tmp_path / "wanspec.yaml").read_text())
    assert following(wan.argv, "--to").endswith(f":{drafter.port}")
    assert lineup.control_url == f"http://{following(wan.argv, '--control')}"
    assert drafter.core == useless.core == 1


def test_arms_say_whose_lookup_they_have() -> None:
    ours = {"lookup", "draft_model_lookup", "wanspec", "wanspec_no_wait"}
    assert {name for name, arm in ARMS.items() if arm.lookup == "ours"} == ours
    assert {name for name, arm in ARMS.items() if arm.lookup == "vLLM's"} == {"ngram"}
    assert all(arm.lookup == "none" for arm in tree_arms("--trees", "a=max_branches=1; b=off"))


def test_nothing_is_started_that_no_arm_needs(tmp_path: Path) -> None:
    lineup = plan_lineup(options_for(arms=("none", "ngram")), tmp_path)
    assert lineup.sources == ()
    assert lineup.control_url is None and lineup.drafter_stats is None
    assert set(lineup.targets) == {"none"}
    assert [spec.name for spec in plan_lineup(options_for(arms=("wanspec_random",)), tmp_path).sources] == [
        "random drafter"
    ]
    assert plan_lineup(options_for(arms=("wanspec_dead",)), tmp_path).sources == ()


@pytest.mark.parametrize("arm", ["draft_model", "draft_model_lookup"])
def test_both_models_of_a_co_located_arm_are_paced(arm: str, tmp_path: Path) -> None:
    spec = all_specs(options_for(arms=(arm,)), tmp_path)[arm]
    assert spec.env is not None
    assert (spec.env["WANSPEC_PACING"], spec.env["WANSPEC_DRAFT_PACING"]) == ("35.0+0.1", "5.0+0.02")
    bare = all_specs(options_for(arms=(arm,), target_pace=None, draft_pace=None), tmp_path)[arm]
    assert bare.env is not None
    assert (bare.env["WANSPEC_PACING"], "WANSPEC_DRAFT_PACING" in bare.env) == ("0.0+0.0", False)  # counted only


def test_a_dozen_servers_on_one_machine_keep_small_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_for(arms=tuple(ARMS))
    for spec in (*all_specs(options, tmp_path).values(), plan_lineup(options, tmp_path).sources[0]):
        assert following(spec.argv, "--kv-cache-memory-bytes") == "512M"
        assert spec.env is not None
        assert "VLLM_CPU_KVCACHE_SPACE" not in spec.env  # it would prevail, and no value of it says nothing
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert "512M" not in all_specs(options_for(arms=("none",)), tmp_path)["none"].argv


def test_a_time_scale_stretches_every_pace_alike(tmp_path: Path) -> None:
    arms = ("none", "draft_model", "wanspec", "wanspec_random")
    options = options_for(arms=arms, time_scale=2.0, target_pace=Pacing(30.0, 0.1), draft_pace=Pacing(5.0, 0.02))
    drafter, _, nonsense = plan_lineup(options, tmp_path).sources
    specs = all_specs(options, tmp_path)
    assert {(spec.env or {})[PACING_ENV] for spec in specs.values()} == {"60.0+0.2"}
    assert (drafter.env or {})[PACING_ENV] == "10.0+0.04"
    assert "--pace 10.0+0.04" in " ".join(nonsense.argv)
    assert (specs["draft_model"].env or {})[DRAFT_PACING_ENV] == "10.0+0.04"
    assert options.emulated_ms(30.0) == 60.0
    named = options.as_json()
    assert (named["time_scale"], named["target_pace"], named["rtt_ms"][1]) == (2.0, "30.0+0.1", 10.0)


def test_forwards_are_counted_whether_or_not_they_are_paced(tmp_path: Path) -> None:
    for paces in ({}, {"target_pace": None, "draft_pace": None}):
        lineup = plan_lineup(options_for(arms=("none", "wanspec"), **paces), tmp_path)
        files = {name: plan.stats for name, plan in lineup.targets.items()} | {"drafter": lineup.drafter_stats}
        assert files == {name: tmp_path / f"{name}.pacing.json" for name in ("none", "wanspec", "drafter")}
        specs = [*(plan.spec for plan in lineup.targets.values()), lineup.sources[0]]
        assert [(spec.env or {})[STATS_ENV] for spec in specs] == list(map(str, files.values()))


@pytest.mark.parametrize(
    ("arms", "wanted"),
    [
        (tuple(ARMS), "none_constrained"),
        (("draft_model", "none", "wanspec"), "none"),
        (("draft_model", "wanspec"), "wanspec"),
        (("draft_model",), "draft_model"),
        (("ngram", "draft_model", "oracle"), "oracle"),
    ],
)
def test_texts_come_from_a_plain_target_if_there_is_one(arms: tuple[str, ...], wanted: str) -> None:
    assert options_for(arms=arms).texts_from.name == wanted


def test_the_arms_across_the_wan_are_known() -> None:
    across = ["wanspec", "wanspec_no_lookup", "wanspec_no_wait"]
    assert [name for name, arm in ARMS.items() if arm.uses_wan] == across


def test_tree_arms_share_one_target_without_prompt_lookup(tmp_path: Path) -> None:
    trees = tree_arms("--trees", "main-line=max_branches=1; wide=running_branches=64; plain=off")
    options = options_for(trees, arms=("none", "wanspec"), rtt_ms=(0.0, 20.0), concurrency=(1, 8))
    lineup = plan_lineup(options, tmp_path)
    assert set(lineup.targets) == {"none", "wanspec", "trees"}
    assert load_settings(tmp_path / "trees.yaml").fallback == ()
    assert load_settings(tmp_path / "wanspec.yaml").fallback == ("ngram",)
    measured = [cell for cell in cells(options) if cell.arm == "wide"]
    assert measured == [Cell("wide", 0.0, 1), Cell("wide", 20.0, 1)]  # at every round trip, one at a time
    assert [arm.name for arm in options.started] == ["none", "wanspec", "main-line", "wide", "plain"]
    assert options.as_json()["arms"] == ["none", "wanspec", *map(str, trees)]
    assert str(trees[1]) == "wide=running_branches=64"


def test_tree_arms_alone_take_their_texts_past_the_drafter() -> None:
    options = options_for(tree_arms("--trees", "a=max_branches=1; b="), arms=())
    assert options.texts_from.name == "a"
    assert options.texts_from.plain_fields == {"vllm_xargs": {"wanspec": "off"}}
    assert options_for(arms=("none", "wanspec")).texts_from.plain_fields == {}
