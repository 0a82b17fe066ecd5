"""The targets that benches start beside plain vLLM: with co-located speculation, and with remote drafting."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_wanspec.lab.harness.launch import plain_command
from vllm_wanspec.lab.harness.servers import wanspec_command

PLAIN, COLOCATED, REMOTE = "plain", "draft_model", "remote"


def colocated_command(target: Path, draft: Path, gamma: int) -> list[str]:
    """Return the argv that serves a target with vLLM's own draft model beside it, ``gamma`` draft tokens per step."""
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": gamma}
    return [*plain_command(str(target)), "--speculative-config", json.dumps(config)]


def remote_command(target: Path, config: Path, gamma: int) -> list[str]:
    """Return the argv that serves a target with remote drafts, at most ``gamma`` per step."""
    serve = wanspec_command("serve", str(target), "--wanspec", str(config))
    return [*serve, "--speculative-tokens", str(gamma)]
