"""The side-by-side bench's settings: arms, cells, blocks, and the servers that they need."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_wanspec.config import load_settings
from vllm_wanspec.emulate.pacing import DRAFT_PACING_ENV, PACING_ENV, Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.arms import ARMS, Arm, named_arms, tree_arms
from vllm_wanspec.lab.compare.lineup import plan_lineup, trial_spec
from vllm_wanspec.lab.compare.plan import DEFAULT_ARMS, Options, blocks, cells, orders
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.options import parse_list
from vllm_wanspec.lab.harness.servers import ServerSpec
from vllm_wanspec.lab.records import Cell


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
def test_every_cell_is_in_one_block_of_each_repeat(rtts_ms: tuple[float, ...]) -> None:
    options = options_for(arms=tuple(ARMS), rtt_ms=rtts_ms, concurrency=(1, 8), concurrent_arms=("none", "wanspec"))
    found = blocks(options)
    seen = Counter((cell, block.repeat) for block in found for cell in block.cells)
    assert seen == Counter({(cell, repeat): 1 for cell in cells(options) for repeat in range(3)})
    assert all(cell.rtt_ms in (None, block.rtt_ms) for block in found for cell in block.cells)
    assert [block.concurrency for block in found] == sorted(block.concurrency for block in found)


def test_blocks_are_the_same_at_every_start() -> None:
    assert blocks(options_for(seed=1)) == blocks(options_for(seed=1))
    assert blocks(options_for(seed=1)) != blocks(options_for(seed=2))


def test_arms_without_a_wan_take_their_turns_at_different_round_trips() -> None:
    found = blocks(options_for(rtt_ms=(0.0, 10.0, 20.0, 30.0, 50.0), repeats=1))
    local = [sum(cell.rtt_ms is None for cell in block.cells) for block in found]
    assert sorted(local) == [1, 1, 1, 1, 1]


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


def test_each_arm_gets_the_server_that_it_describes(tmp_path: Path) -> None:
    options = options_for(arms=tuple(ARMS), speculative_tokens=6)
    lineup = plan_lineup(options, tmp_path)
    assert set(lineup.targets) == set(ARMS) - {"draft_model"}  # its γ is not known yet
    assert "--speculative-config" not in lineup.targets["none"].argv
    assert "--no-async-scheduling" not in lineup.targets["none"].argv
    assert "--no-async-scheduling" in lineup.targets["none_constrained"].argv
    wanted = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    assert speculation(lineup.targets["ngram"]) == wanted
    oracle = lineup.targets["oracle"]
    assert speculation(oracle)["model"] == "vllm_wanspec.sim.proposers.OracleProposer"
    assert oracle.env is not None
    assert oracle.env["WANSPEC_ORACLE"] == str(lineup.oracle_path)
    assert following(lineup.targets["wanspec"].argv, "--speculative-tokens") == "6"
    assert all(spec.core == 0 for spec in lineup.targets.values())
    ports = [spec.port for spec in (*lineup.sources, *lineup.targets.values())]
    assert len(set(ports)) == len(ports)


def test_remote_arms_differ_in_their_drafter_and_its_rule(tmp_path: Path) -> None:
    lineup = plan_lineup(options_for(arms=tuple(ARMS)), tmp_path)
    drafter, wan, useless = lineup.sources
    settings = {arm: load_settings(tmp_path / f"{arm}.yaml") for arm in lineup.metrics}
    ports = {arm: int(found.draft_endpoints[0].url.rpartition(":")[2]) for arm, found in settings.items()}
    assert ports["wanspec"] == ports["wanspec_no_wait"] == wan.port
    assert ports["wanspec_random"] == useless.port
    assert ports["wanspec_dead"] not in {spec.port for spec in (*lineup.sources, *lineup.targets.values())}
    assert settings["wanspec"].late.policy == "adaptive"
    assert settings["wanspec_no_wait"].late.policy == "none"
    assert "late" not in yaml.safe_load((tmp_path / "wanspec.yaml").read_text())
    assert following(wan.argv, "--to").endswith(f":{drafter.port}")
    assert lineup.control_url == f"http://{following(wan.argv, '--control')}"
    assert drafter.core == useless.core == 1


def test_nothing_is_started_that_no_arm_needs(tmp_path: Path) -> None:
    lineup = plan_lineup(options_for(arms=("none", "ngram")), tmp_path)
    assert lineup.sources == ()
    assert lineup.control_url is None
    assert set(lineup.targets) == {"none", "ngram"}
    assert [spec.name for spec in plan_lineup(options_for(arms=("wanspec_random",)), tmp_path).sources] == [
        "random drafter"
    ]
    assert plan_lineup(options_for(arms=("wanspec_dead",)), tmp_path).sources == ()


def test_both_models_of_the_co_located_arm_are_paced(tmp_path: Path) -> None:
    options = options_for(arms=("draft_model",))
    spec = trial_spec(options, 5, tmp_path)
    assert speculation(spec) == {"method": "draft_model", "model": "/small", "num_speculative_tokens": 5}
    assert spec.env is not None
    assert (spec.env["WANSPEC_PACING"], spec.env["WANSPEC_DRAFT_PACING"]) == ("35.0+0.1", "5.0+0.02")
    bare = trial_spec(options_for(arms=("draft_model",), target_pace=None, draft_pace=None), 5, tmp_path)
    assert bare.env is not None
    assert (bare.env["WANSPEC_PACING"], "WANSPEC_DRAFT_PACING" in bare.env) == ("0.0+0.0", False)  # counted only


def test_ten_servers_on_one_machine_keep_small_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineup = plan_lineup(options_for(arms=tuple(ARMS)), tmp_path)
    for spec in (*lineup.targets.values(), lineup.sources[0], trial_spec(options_for(), 3, tmp_path)):
        assert following(spec.argv, "--kv-cache-memory-bytes") == "512M"
        assert spec.env is not None
        assert "VLLM_CPU_KVCACHE_SPACE" not in spec.env  # it would prevail, and no value of it says nothing
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert "512M" not in plan_lineup(options_for(arms=("none",)), tmp_path).targets["none"].argv


def test_a_time_scale_stretches_every_pace_alike(tmp_path: Path) -> None:
    arms = ("none", "draft_model", "wanspec", "wanspec_random")
    options = options_for(arms=arms, time_scale=2.0, target_pace=Pacing(30.0, 0.1), draft_pace=Pacing(5.0, 0.02))
    lineup = plan_lineup(options, tmp_path)
    drafter, _, nonsense = lineup.sources
    home = trial_spec(options, 3, tmp_path)
    assert [(spec.env or {})[PACING_ENV] for spec in lineup.targets.values()] == ["60.0+0.2"] * 3
    assert (drafter.env or {})[PACING_ENV] == "10.0+0.04"
    assert "--pace 10.0+0.04" in " ".join(nonsense.argv)
    assert (home.env or {})[PACING_ENV] == "60.0+0.2" and (home.env or {})[DRAFT_PACING_ENV] == "10.0+0.04"
    assert options.emulated_ms(30.0) == 60.0
    named = options.as_json()
    assert (named["time_scale"], named["target_pace"], named["rtt_ms"][1]) == (2.0, "30.0+0.1", 10.0)


def test_without_pacing_there_are_no_statistics(tmp_path: Path) -> None:
    options = options_for(arms=("none", "wanspec"), target_pace=None, draft_pace=None)
    assert plan_lineup(options, tmp_path).stats == {}
    assert set(plan_lineup(options_for(arms=("none", "wanspec")), tmp_path).stats) == {"none", "wanspec", "drafter"}


@pytest.mark.parametrize(
    ("arms", "wanted"),
    [
        (tuple(ARMS), "none_constrained"),
        (("draft_model", "none", "wanspec"), "none"),
        (("draft_model", "wanspec"), "wanspec"),
        (("draft_model",), "draft_model"),
    ],
)
def test_texts_come_from_a_plain_target_if_there_is_one(arms: tuple[str, ...], wanted: str) -> None:
    assert options_for(arms=arms).texts_from.name == wanted


def test_the_arms_across_the_wan_are_known() -> None:
    assert [name for name, arm in ARMS.items() if arm.uses_wan] == ["wanspec", "wanspec_no_wait"]


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
