"""What is read around requests."""

from __future__ import annotations

import asyncio
import os

from metrics_pages import served

from vllm_wanspec.lab.harness.probes import Probe


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
