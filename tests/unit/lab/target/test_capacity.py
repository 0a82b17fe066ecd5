"""The capacity bench: its requests, its rates, its servers, and a whole run with stand-ins."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness import machine, probes
from vllm_wanspec.lab.harness.client import Completion
from vllm_wanspec.lab.harness.models import DemoModels, Prompt
from vllm_wanspec.lab.target import capacity, capacity_measure
from vllm_wanspec.lab.target.capacity_measure import client_rates, schedule, take_texts
from vllm_wanspec.lab.target.capacity_plan import DRAFTER, CapacityOptions, Load, Plan, plan_servers
from vllm_wanspec.lab.target.clients import Text

FAKE = Path(__file__).parents[1] / "fake_vllm.py"
MODELS = DemoModels(Path("T"), Path("D"), Path("P"), Path("bench_P"))


def test_rates_count_while_all_clients_are_served() -> None:
    # All are served from 2 s, when the second begins, to 8 s, when the first ends.
    first = [(1.0, 1), (3.0, 2), (5.0, 2), (8.0, 3)]
    second = [(2.0, 1), (4.0, 1), (6.0, 3), (9.0, 5)]
    rates, window_s = client_rates([first, second])
    assert rates == (pytest.approx(5.0 / 5.0), pytest.approx(4.0 / 4.0))
    assert window_s == 6.0
    assert client_rates([first]) == ((pytest.approx(1.0),), 7.0)


def test_clients_that_never_ran_together_have_no_window() -> None:
    rates, window_s = client_rates([[(1.0, 1), (2.0, 4)], [(3.0, 1), (5.0, 4)]])
    assert (rates, window_s) == ((4.0, 2.0), 0.0)
    # One piece says nothing about a rate.
    assert client_rates([[(1.0, 1), (9.0, 1)], [(0.0, 1), (3.0, 2), (9.0, 1)]])[0] == (0.125, 1 / 6)
    assert client_rates([[(1.0, 5)]]) == ((0.0,), 0.0)


@pytest.mark.parametrize(
    ("texts", "clients", "each"), [(8, 1, 8), (8, 2, 4), (8, 4, 2), (8, 8, 2), (8, 16, 2), (8, 12, 2), (3, 2, 3)]
)
def test_every_text_is_asked_for_equally_often(texts: int, clients: int, each: int) -> None:
    known = [Text(str(number), (1, 2), (3,)) for number in range(texts)]
    planned = schedule(known, clients)
    assert [len(requests) for requests in planned] == [each] * clients
    names = [text.name for requests in planned for text in requests]
    assert {names.count(text.name) for text in known} == {clients * each // texts}


class Plain:
    """Continues a prompt by counting, or repeats itself, or ends early, as the prompt says."""

    async def complete(self, prompt: str | Sequence[int], max_tokens: int) -> Completion:
        ids = tuple(map(ord, prompt)) if isinstance(prompt, str) else tuple(prompt)
        count = 5 if ids[0] == ord("e") else max_tokens
        out = (7,) * count if ids[0] == ord("r") else tuple(range(count))
        return Completion(ids, out, "", 0.0, 0.0, "length")


def taken(lengths: dict[str, int], wanted: int) -> list[Text]:
    prompts = [Prompt(name, name * length) for name, length in lengths.items()]
    plain: Any = Plain()
    return asyncio.run(take_texts(plain, prompts, CapacityOptions(prompts=wanted, max_tokens=40)))


def test_prompts_leave_one_row_to_the_prefix_cache() -> None:
    found = taken({"a": 33, "b": 32, "e": 100, "r": 100, "c": 100, "d": 64, "f": 50}, wanted=3)
    # `b` has no whole block before its last token, `e` ends early, `r` repeats itself; `f` is not needed.
    assert [(text.name, len(text.prompt_ids)) for text in found] == [("a", 33), ("c", 97), ("d", 33)]
    assert found[0].expected == tuple(range(40))
    with pytest.raises(ConfigError, match="only 1 of 2 prompts"):
        taken({"a": 33, "e": 33}, wanted=2)


def test_what_is_started(tmp_path: Path) -> None:
    options = CapacityOptions(gammas=(2, 4), time_scale=2.0)
    plan = plan_servers(options, options.loads[1], MODELS, tmp_path)
    specs = {spec.name: spec for spec in plan.specs}
    remote = ["remote-2", "remote-4", "remote_adaptive-4"]
    assert list(specs) == [DRAFTER, "wan", "plain", "draft_model-2", "draft_model-4", *remote]
    assert list(plan.metrics) == remote
    for name, pace in ((DRAFTER, "10.0+0.04"), ("plain", "10.0+8.0"), ("draft_model-4", "10.0+8.0")):
        env = specs[name].env
        assert env is not None
        assert env["WANSPEC_PACING"] == pace
        assert env["WANSPEC_PACING_STATS"] == str(plan.stats[name])
        assert env.get("WANSPEC_DRAFT_PACING") == ("8.0+2.0" if name == "draft_model-4" else None)
    argv = specs["draft_model-2"].argv
    speculative = json.loads(argv[argv.index("--speculative-config") + 1])
    assert speculative == {"method": "draft_model", "model": "D", "num_speculative_tokens": 2}
    argv = specs["remote-2"].argv
    assert argv[argv.index("--speculative-tokens") + 1] == "2"
    fixed, adaptive = (yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in remote[1:])
    assert fixed["fallback"] == adaptive["fallback"] == []  # no prompt lookup on either side
    assert fixed["length"] == {"policy": "fixed", "shut_off": False}
    assert "length" not in adaptive
    assert fixed["draft_endpoints"][0]["url"] == f"http://127.0.0.1:{specs['wan'].port}"


class NoWan:
    """Stands in for the proxy's control; remembers what it was set to."""

    trips_ms: list[float]

    def __init__(
        self, http: object, url: str, metrics: Sequence[str], check_alive: Callable[[], None], time_scale: float
    ) -> None:
        check_alive()

    async def set(self, rtt_ms: float) -> bool:
        self.trips_ms.append(rtt_ms)
        return rtt_ms == 0.0


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of models without weights, and programs that are started in place of vLLM."""
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    lines = [json.dumps({"module": name, "prompt": f"# {name * 40}"}) for name in "ab"]
    for name in ("prompts.jsonl", "bench_prompts.jsonl"):
        (tmp_path / name).write_text("\n".join(lines))

    def servers(options: CapacityOptions, load: Load, models: DemoModels, folder: Path) -> Plan:
        plan = plan_servers(options, load, models, folder)
        specs = []
        for spec in plan.specs:
            if spec.name == "wan":
                continue
            argv = [sys.executable, str(FAKE), "--port", str(spec.port), "--stats", str(plan.stats[spec.name])]
            if spec.name in plan.metrics:
                argv += ["--metrics-port", plan.metrics[spec.name].rpartition(":")[2].partition("/")[0]]
            differs = tmp_path / f"{spec.name} differs"
            argv += ["--differ-at", "5"] if differs.exists() else []
            argv += ["--gap", "0.5"] if spec.name == "plain" and (tmp_path / "gap").exists() else []
            specs.append(replace(spec, argv=argv))
        return replace(plan, specs=tuple(specs))

    monkeypatch.setattr(capacity, "plan_servers", servers)
    monkeypatch.setattr(capacity_measure, "Wan", NoWan)
    monkeypatch.setattr(NoWan, "trips_ms", [], raising=False)
    for name in ("SETTLE_MIN_S", "SETTLE_POLL_S"):
        monkeypatch.setattr(probes, name, 0.0)
    monkeypatch.setattr(machine, "missing_vllm", lambda: None)
    return tmp_path


def invoke(folder: Path, *arguments: str) -> Any:
    app = Typer()
    app.command()(capacity.main)
    common = ["--models", str(folder), "--prompts", "2", "--max-tokens", "12", "--loads", "saturated"]
    return CliRunner().invoke(app, [*common, "--saturated-clients", "1,3", "--gammas", "3", *arguments])


def test_a_whole_run(stand_ins: Path) -> None:
    json_file, page = stand_ins / "c.json", stand_ins / "c.md"
    done = invoke(stand_ins, "--json", str(json_file), "--markdown", str(page))
    assert done.exit_code == 0, done.output
    data = json.loads(json_file.read_text())
    cells = [(row["arm"], row["gamma"], row["rtt_ms"], row["clients"]) for row in data["rows"]]
    arms = [("plain", None, None), ("draft_model", 3, None)]
    arms += [(kind, 3, rtt_ms) for rtt_ms in (0, 30) for kind in ("remote", "remote_adaptive")]
    assert cells == [(*arm, clients) for arm in arms for clients in (1, 3)]
    assert NoWan.trips_ms == [0.0, 45.0]  # each once, at the time scale of 1.5
    assert "the links do not measure R = 30 ms" in done.output
    for row in data["rows"]:
        # One client sends both prompts; three send two each. The stand-in answers two tokens at a time.
        assert (row["tokens"], row["steps"]) == ((20, 10) if row["clients"] == 1 else (60, 30))
        assert len(row["rates"]) == row["clients"]
        assert row["ties"] == row["wrong"] == []
        assert all(counts["overruns"] == 0 for counts in row["paced"].values())
        # The stand-in for the drafter runs no forward.
        assert set(row["paced"]) == {row["arm"] + (f"-{row['gamma']}" if row["gamma"] else "")}
    assert data["command"].startswith("python -m vllm_wanspec.lab.target.capacity")
    assert data["time_scale"] == 1.5
    assert "saturated: tokens per second and client" in page.read_text()
    assert page.with_suffix(".png").exists()
    assert '\n  {"load": "saturated", "arm": "plain"' in json_file.read_text()  # a line per row


def test_outputs_that_differ(stand_ins: Path) -> None:
    (stand_ins / "remote-3 differs").touch()
    done = invoke(stand_ins, "--rtt-ms", "0", "--json", str(stand_ins / "c.json"))
    assert done.exit_code == 0, done.output
    rows = json.loads((stand_ins / "c.json").read_text())["rows"]
    ties = {row["arm"]: row["ties"] for row in rows}
    assert ties["remote"] == ["remote, R = 0 ms: a, token 6", "remote, R = 0 ms: b, token 6"]
    assert not ties["draft_model"] and not ties["remote_adaptive"]
    (stand_ins / "gap").touch()
    done = invoke(stand_ins, "--rtt-ms", "0", "--json", str(stand_ins / "c.json"))
    assert done.exit_code == 1
    assert "error: different output: remote, R = 0 ms: a, token 6" in done.output
    rows = json.loads((stand_ins / "c.json").read_text())["rows"]
    wrong = [row for row in rows if row["wrong"]]
    assert {row["arm"] for row in wrong} == {"remote"}
    assert not any(row["valid"] for row in wrong)


def test_a_run_that_cannot_be(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, problem in (
        (["--json", str(stand_ins)], "--json: cannot write"),
        (["--loads", "all"], "bench-capacity: --loads: 'all' is not a list of bench and saturated"),
        (["--saturated-clients", "0,1"], "clients must be different numbers from 1"),
        (["--gammas", "x"], "--gammas: 'x' is not a list of numbers"),
        (["--saturated-target-pace", "5"], "without a cost per token"),
        (["--prompts", "3"], "--prompts: only 2 of 2 prompts have texts of 12 tokens"),
    ):
        done = invoke(stand_ins, *arguments)
        assert done.exit_code == 2, done.output
        assert problem in done.output
    monkeypatch.setattr(machine, "missing_vllm", lambda: "vLLM is not installed")
    assert "vLLM is not installed" in invoke(stand_ins).output
