"""What servers are started with, and what a dying one explains."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_wanspec.emulate.pacing import PACING_ENV, STATS_ENV, Pacing
from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.harness.client import ClientError
from vllm_wanspec.lab.harness.launch import dying_servers_explain, vllm_spec, wan_spec
from vllm_wanspec.lab.harness.servers import ServerError, ServerGroup
from vllm_wanspec.sim.controller import DrafterError


class DyingGroup(ServerGroup):
    """Its server dies while somebody waits for that."""

    def __init__(self) -> None:
        self.waited_s: list[float] = []

    def check_alive(self, within_s: float = 0.0) -> None:
        self.waited_s.append(within_s)
        if within_s:
            raise ServerError("drafter ended by itself")


@pytest.mark.parametrize("error", [ClientError("no answer"), DrafterError("the connection broke")])
def test_a_dying_server_explains_what_failed_at_it(error: WanspecError) -> None:
    with pytest.raises(ServerError, match="ended by itself"), dying_servers_explain(DyingGroup()):
        raise error


def test_other_errors_do_not_wait_for_a_death() -> None:
    group = DyingGroup()
    with pytest.raises(WanspecError, match="no hits"), dying_servers_explain(group):
        raise WanspecError("no hits")
    assert group.waited_s == []


@pytest.mark.parametrize(("pace", "setting"), [(Pacing(35.0, 0.1), "35.0+0.1"), (None, "0.0+0.0")])
def test_a_server_with_a_statistics_file_counts_whether_it_is_paced_or_not(
    pace: Pacing | None, setting: str, tmp_path: Path
) -> None:
    stats = tmp_path / "plain.json"
    stats.write_text("of a former run")
    spec = vllm_spec("plain", ["vllm"], 1234, None, pace, stats)
    assert spec.env is not None
    assert (spec.env[PACING_ENV], spec.env[STATS_ENV]) == (setting, str(stats))
    assert not stats.exists()
    assert not {PACING_ENV, STATS_ENV} & (vllm_spec("plain", ["vllm"], 1234, None, None, None).env or {}).keys()


def test_the_wan_proxy_is_started_with_its_settings() -> None:
    plain = ["--listen", "127.0.0.1:9000", "--to", "127.0.0.1:8000", "--rtt-ms", "30"]
    assert wan_spec(9000, 8000, 30.0).argv[-6:] == plain
    assert wan_spec(9000, 8000, 30.0, 9001).argv[-8:] == [*plain, "--control", "127.0.0.1:9001"]
