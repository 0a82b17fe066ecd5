"""The targets that benches start beside plain vLLM: with co-located speculation, and with remote drafting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import plain_command
from vllm_wanspec.lab.harness.servers import ServerSpec, wanspec_command

PLAIN, COLOCATED, REMOTE = "plain", "draft_model", "remote"
#: Without a GPU many servers share the memory; this is room for 40,000 of the demo target's tokens.
LEAN_FLAGS = ("--kv-cache-memory-bytes", "512M")
CACHE_ENV = "VLLM_CPU_KVCACHE_SPACE"  # which would prevail


def colocated_command(target: Path, draft: Path, gamma: int) -> list[str]:
    """Return the argv that serves a target with vLLM's own draft model beside it, ``gamma`` draft tokens per step."""
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": gamma}
    return [*plain_command(str(target)), "--speculative-config", json.dumps(config)]


def remote_command(target: Path, config: Path, gamma: int) -> list[str]:
    """Return the argv that serves a target with remote drafts, at most ``gamma`` per step."""
    serve = wanspec_command("serve", str(target), "--wanspec", str(config))
    return [*serve, "--speculative-tokens", str(gamma)]


def lean(spec: ServerSpec) -> ServerSpec:
    """Return the server with less memory for its KV cache, where that is the machine's own."""
    if machine.has_gpu():
        return spec
    env = {key: value for key, value in (spec.env or {}).items() if key != CACHE_ENV}
    return dataclasses.replace(spec, argv=[*spec.argv, *LEAN_FLAGS], env=env)
