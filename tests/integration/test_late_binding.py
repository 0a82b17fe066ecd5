"""Under async scheduling a draft that arrives after its step has been scheduled is verified in it."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from mrv2_env import mrv2_env

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.servers import HOST, free_ports

from .programs import Program

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

DEADLINE_S = 240.0


def test_nodes_that_arrive_after_a_step_is_scheduled_are_verified_in_it(models: DemoModels, tmp_path: Path) -> None:
    config, out = tmp_path / "nobody.yaml", tmp_path / "late.json"
    endpoint = {"name": "nobody", "url": f"http://{HOST}:{free_ports(1)[0]}"}
    config.write_text(
        yaml.safe_dump({"draft_endpoints": [endpoint], "fallback": [], "length": {"shut_off": False}}), "utf-8"
    )
    core = machine.pin_cores()[0]
    argv = [sys.executable, str(Path(__file__).with_name("late_binding.py")), "--model", str(models.target)]
    argv += ["--config", str(config), "--out", str(out)]
    env = machine.server_env(core) | mrv2_env(async_scheduling=True)
    ended = Program("late", argv, env, tmp_path, core).end(DEADLINE_S)
    assert ended.code == 0, ended.stderr[-2000:]
    found = json.loads(out.read_text("utf-8"))
    assert (found["scheduler"], found["batch_queue"]) == ("AsyncScheduler", 2)
    assert found["drafted"] == found["plain"]
    late = 0
    events = found["events"]
    for before, arrived, verified in zip(events, events[1:], events[2:], strict=False):
        if (before[0], arrived[0], verified[0]) == ("scheduled", "arrived", "verified"):
            # Of what was verified nothing had arrived when the step was scheduled.
            assert verified[1] == arrived[1][1]
            late += len(verified[1])
    assert late >= 20, f"vacuous: {late} tokens arrived late"
