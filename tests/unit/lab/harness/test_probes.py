"""What is read around requests."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from metrics_pages import served

from vllm_wanspec.emulate.pacing import COUNT_ONLY, Pacer, Pacing
from vllm_wanspec.lab.harness import probes
from vllm_wanspec.lab.harness.probes import Probe
from vllm_wanspec.lab.target.colocated import counts_path


def test_counters_are_read_from_target_controller_and_drafter_once_they_rest() -> None:
    drafted = iter([10, 14, 18, 18, 99])
    pages = {
        "/target": lambda: (
            'vllm:spec_decode_num_drafts_total{engine="0"} 3.0\nvllm:spec_decode_num_draft_tokens_total 12\n'
            "vllm:spec_decode_num_accepted_tokens_total 7\n"
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{p="0"} 3\n'
        ),
        "/controller": lambda: "wanspec_hits_total 4\nwanspec_accepted_lookup_total 2\nwanspec_x_total 1\n",
        "/drafter": lambda: f"wanspec_drafted_tokens_total {next(drafted)}\n",
    }

    async def main() -> None:
        async with served(pages) as (http, url):
            probe = Probe(http, f"{url}/target", f"{url}/controller", f"{url}/drafter", {"target": os.getpid()})
            settled = await probe.settled(0.0)
            assert settled.values == {
                "num_drafts": 3.0,
                "num_draft_tokens": 12.0,
                "num_accepted_tokens": 7.0,
                "hits": 4.0,
                "accepted_lookup": 2.0,
                "drafted_tokens": 18.0,
            }
            assert next(drafted) == 99
            assert probe.cpu_s()["target"] > 0.0
            plain = Probe(http, f"{url}/target", None, None, {})
            assert set((await plain.settled(None)).values) == {"num_drafts", "num_draft_tokens", "num_accepted_tokens"}
            assert plain.cpu_s() == {}

    asyncio.run(main())


def stats_files(folder: Path) -> tuple[dict[str, Path], dict[str, Pacer]]:
    """A target's and a drafter's statistics files, and what counts into them."""
    paths = {side: folder / f"{side}.json" for side in ("target", "drafter")}
    return paths, {side: Pacer(COUNT_ONLY, COUNT_ONLY, path) for side, path in paths.items()}


def test_forwards_are_those_that_their_processes_have_counted(tmp_path: Path) -> None:
    paths, pacers = stats_files(tmp_path)
    pages = {"/target": lambda: "", "/controller": lambda: "wanspec_hits_total 4\n"}

    async def main() -> None:
        async with served(pages) as (http, url):
            probe = Probe(http, f"{url}/target", f"{url}/controller", None, {}, paths)
            assert (await probe.read()).values == {"hits": 4.0}  # as long as nothing has run
            pacers["target"].run(lambda: None, 1)
            before = await probe.read()
            pacers["target"].pacing = Pacing(0.0, 1e-9)  # which no work can keep
            for _ in range(2):
                pacers["target"].run(lambda: None, 1)
            pacers["target"].draft_pacing = Pacing(0.5)
            for _ in range(6):
                pacers["target"].run_draft(lambda: None, 1)
            pacers["drafter"].run(lambda: None, 1)
            assert (await probe.read()).since(before).values == {
                "hits": 0.0,
                "target_forwards": 2,
                "target_overruns": 2,
                "local_draft_passes": 6,
                "local_draft_overruns": 0,
                "local_draft_paced_ms": 3.0,
                "drafter_forwards": 1,
                "drafter_overruns": 0,
            }

    asyncio.run(main())


def test_the_round_trip_is_the_link_s_own() -> None:
    links = iter(["", *(f'wanspec_drafter_median_rtt_seconds{{drafter="a"}} {seconds}\n' for seconds in (0.0, 0.0304))])
    pages = {"/target": lambda: "", "/controller": lambda: next(links)}

    async def main() -> None:
        async with served(pages) as (http, url):
            probe = Probe(http, f"{url}/target", f"{url}/controller", None, {})
            for wanted in (None, None, pytest.approx(30.4)):  # nothing served, nothing measured yet, measured
                await probe.read()
                assert probe.rtt_ms == wanted

    asyncio.run(main())


def test_a_co_located_draft_model_with_lookup_tells_whose_its_tokens_were(tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    counts = {"accepted_draft": 21, "accepted_lookup": 5, "offered_draft": 36, "offered_lookup": 9}
    counts_path(control).write_text(json.dumps(counts))

    async def main() -> None:
        async with served({"/target": lambda: ""}) as (http, url):
            found = await Probe(http, f"{url}/target", None, None, {}, control=control).read()
            wanted = {
                "accepted_main_line": 21.0,
                "accepted_branch": 0.0,
                "accepted_lookup": 5.0,
                "drafted_tokens": 36.0,
            }
            assert found.values == wanted

    asyncio.run(main())


@pytest.mark.parametrize(
    ("side", "counter"),
    [("target", "target_forwards"), ("target", "local_draft_passes"), ("drafter", "drafter_forwards")],
)
def test_settled_counters_have_waited_for_the_last_forward(
    side: str, counter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, pacers = stats_files(tmp_path)
    pacer = pacers[side]
    run = pacer.run_draft if counter == "local_draft_passes" else pacer.run
    run(lambda: None, 1)
    reads: Iterator[int] = iter([2, 1, 0, 0, 5])  # forwards that come between two readings
    monkeypatch.setattr(probes, "SETTLE_POLL_S", 0.001)

    def page() -> str:
        for _ in range(next(reads)):
            run(lambda: None, 1)
        return "wanspec_drafted_tokens_total 7\n"

    async def main() -> None:
        async with served({"/target": lambda: "", "/drafter": page}) as (http, url):
            probe = Probe(http, f"{url}/target", None, f"{url}/drafter", {}, paths)
            assert (await probe.settled(0.0)).values[counter] == 4
        assert [*reads] == [0, 5]

    asyncio.run(main())


def test_a_target_alone_settles_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, pacers = stats_files(tmp_path)
    pacers["target"].run(lambda: None, 1)
    waits: Iterator[int] = iter([1, 0])  # forwards after the first reading, and the second
    sleep = asyncio.sleep

    async def busy_sleep(seconds: float) -> None:
        if seconds == probes.SETTLE_POLL_S:
            for _ in range(next(waits)):
                pacers["target"].run(lambda: None, 1)
        await sleep(0.0)

    async def main() -> None:
        async with served({"/target": lambda: ""}) as (http, url):
            probe = Probe(http, f"{url}/target", None, None, {}, {"target": paths["target"]})
            monkeypatch.setattr(probes.asyncio, "sleep", busy_sleep)
            settled = await probe.settled(None)
            monkeypatch.setattr(probes.asyncio, "sleep", sleep)
            assert settled.values["target_forwards"] == 2
        assert [*waits] == []

    asyncio.run(main())
