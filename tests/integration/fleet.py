"""The servers of the integration tests: how each is started, and where what it writes is found."""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mrv2_env import mrv2_env

from vllm_wanspec.config import TOKEN_ENV
from vllm_wanspec.emulate.pacing import PACING_ENV
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import DemoModels, find_models
from vllm_wanspec.lab.harness.servers import HOST, Server, ServerGroup, ServerSpec, free_ports, wanspec_command

MODELS_ENV = "WANSPEC_TEST_MODELS"
MODEL_NAME = "test-target"
TOKEN = "the-drafter-s-token"
PACE = "30+0.1"
"""Step time of targets with remote drafts: long enough for drafts to be in time when two cores do everything."""
CONTEXT_LIMIT, CHUNK, BLOCKS, SPECULATIVE_TOKENS = 256, 64, 25, 4
"""Of the small target: tokens of context, tokens per prefill step, KV cache blocks of 32 tokens (one goes unused),
draft tokens verified per step."""
WRONG_TOKEN_ENV = "WANSPEC_TEST_WRONG_TOKEN"
BAD_DRAFTERS = {
    "unreachable": "start `wanspec drafter` there or mend the url",
    "wrong-token": f"set {WRONG_TOKEN_ENV} here to the drafter's WANSPEC_TOKEN",
    "other-vocabulary": "serve a draft model with the target's tokenizer",
    "garbled": "run a `wanspec drafter` of our version there",
    "turncoat": "run a `wanspec drafter` of our version there",
}
"""Drafters of the small target beside the good one, and what their log line must say."""
THREADS_ENV = "VLLM_CPU_OMP_THREADS_BIND"
START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 20.0


def find_test_models() -> DemoModels:
    """The demo's models, or those of the folder that ``WANSPEC_TEST_MODELS`` names."""
    root = Path(__file__).parents[2] / "examples" / "demo_models"
    return find_models(Path(os.environ.get(MODELS_ENV) or root))


def read_prompts(models: DemoModels) -> list[str]:
    lines = models.prompts.read_text("utf-8").splitlines()
    return [str(json.loads(line)["prompt"]) for line in lines if line.strip()]


@dataclass(frozen=True)
class Target:
    """A running target, and the metrics of its controller if it has one."""

    server: Server
    metrics_url: str | None = None

    @property
    def url(self) -> str:
        return self.server.url

    def log(self) -> str:
        return self.server.log_path.read_text("utf-8", "replace")


@dataclass
class Drafter:
    """The drafter, which can be killed and started again at the same address."""

    group: ServerGroup
    spec: ServerSpec
    server: Server = field(init=False)
    starts: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.server = self.group.start(replace(self.spec, name=f"{self.spec.name}-{self.starts}"))

    def kill(self) -> None:
        """SIGKILL to its whole process group; returns when nothing of it runs any more."""
        self.server.signal(signal.SIGKILL)
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        while self.server.is_running():
            assert time.monotonic() < deadline_s, "the drafter survived SIGKILL"
            time.sleep(0.02)

    @property
    def url(self) -> str:
        return self.server.url


V1, MRV2, ASYNC = "v1", "mrv2", "mrv2-async"
EACH_RUNNER = pytest.mark.parametrize(
    "runner",
    [V1, pytest.param(MRV2, marks=pytest.mark.slow), pytest.param(ASYNC, marks=pytest.mark.slow)],
    indirect=True,
    scope="package",
)
"""vLLM's model runners: V1, and Model Runner V2 without and with async scheduling, its kernels interpreted on a CPU."""


VERIFY_ALL = {"length": {"policy": "fixed", "shut_off": False}}
"""Of targets whose exactness is tested: drafts that hardly pay are verified too, so that many are rejected."""
REMOTE_ALONE = VERIFY_ALL | {"fallback": []}
"""The same without prompt lookup, which would take the places of many of them."""


def on_runner(runner: str) -> dict[str, Any]:
    """What `Fleet.wanspec` needs for a target on a model runner."""
    if runner == V1:
        return {}
    flags = [] if runner == ASYNC else ["--no-async-scheduling"]
    return {"extra_flags": flags, "extra_env": mrv2_env(async_scheduling=runner == ASYNC)}


@dataclass(frozen=True)
class Fleet:
    """Starts servers in one group, which stops them all."""

    group: ServerGroup
    models: DemoModels
    folder: Path

    def drafter(self) -> Drafter:
        """Not paced, and shares its core with the plain target, which idles while drafts are wanted."""
        (port,) = free_ports(1)
        core = machine.pin_cores()[1]
        argv = [*wanspec_command("drafter", str(self.models.draft)), "--port", str(port), *flags()]
        return Drafter(self.group, ServerSpec("drafter", argv, port, machine.server_env(core) | token_env(), core))

    def plain(self) -> Target:
        """Stock ``vllm serve`` without speculation."""
        (port,) = free_ports(1)
        core = machine.pin_cores()[1]
        argv = vllm_command("serve", str(self.models.target), "--served-model-name", MODEL_NAME)
        argv += ["--port", str(port), *flags()]
        return Target(self.group.start(ServerSpec("plain", argv, port, machine.server_env(core), core)))

    def wanspec(
        self,
        name: str,
        config: Mapping[str, object],
        *,
        model: Path | None = None,
        ranks: int = 1,
        speculative_tokens: int = 8,
        extra_flags: Sequence[str] = (),
        extra_env: Mapping[str, str] | None = None,
    ) -> Target:
        """A paced target with remote drafts.

        Args:
            name: For its log file.
            config: The YAML file without ``metrics``.
            model: The demo's target if none is given.
            ranks: Tensor-parallel processes; two of them use the drafter's core too.
            speculative_tokens: Most draft tokens verified per step.
            extra_flags: More ``vllm serve`` flags; the last of two counts.
            extra_env: More environment variables.
        """
        port, metrics_port = free_ports(2)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "metrics": {"port": metrics_port}}), "utf-8")
        core = machine.pin_cores()[0]
        env = machine.server_env(core) | token_env() | {PACING_ENV: PACE} | dict(extra_env or {})
        argv = wanspec_command("serve", str(model or self.models.target), "--wanspec", str(path))
        argv += ["--speculative-tokens", str(speculative_tokens), "--port", str(port)]
        argv += ["--served-model-name", MODEL_NAME, *flags(), *extra_flags]
        if ranks > 1:
            argv += ["--tensor-parallel-size", str(ranks), "--distributed-executor-backend", "mp"]
            cores, core = machine.pin_cores(), None
            env[THREADS_ENV] = "nobind" if None in cores else "|".join(str(cores[rank % 2]) for rank in range(ranks))
        server = self.group.start(ServerSpec(name, argv, port, env, core))
        return Target(server, f"http://{HOST}:{metrics_port}/metrics")

    def small(self, drafter_url: str, peer_urls: Mapping[str, str], runner: str = V1) -> Target:
        """A target in tight straits, with bad drafters beside the good one, which it reaches through the relay."""
        more = on_runner(runner)
        urls = {name: peer_urls[name] for name in ("other-vocabulary", "garbled", "turncoat")}
        urls |= {"good": peer_urls["relay"], "unreachable": f"http://{HOST}:{free_ports(1)[0]}"}
        endpoints = [{"name": name, "url": url} for name, url in urls.items()]
        endpoints.append({"name": "wrong-token", "url": drafter_url, "token_env": WRONG_TOKEN_ENV})
        return self.wanspec(
            f"small-{runner}",
            {"draft_endpoints": endpoints} | VERIFY_ALL,
            speculative_tokens=SPECULATIVE_TOKENS,
            extra_flags=[
                *("--max-model-len", str(CONTEXT_LIMIT)),
                *("--max-num-batched-tokens", str(CHUNK)),
                *("--max-num-seqs", "8"),
                *("--num-gpu-blocks-override", str(BLOCKS)),
                *more.get("extra_flags", ()),
            ],
            extra_env={WRONG_TOKEN_ENV: "not-" + TOKEN} | more.get("extra_env", {}),
        )

    def stop(self, server: Server) -> None:
        """End one server before the others, whose memory it takes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            server.signal(number)
            deadline_s = time.monotonic() + STOP_DEADLINE_S
            while server.is_running() and time.monotonic() < deadline_s:
                time.sleep(0.05)
        self.group.servers.remove(server)

    def wait_ready(self, *servers: Server) -> None:
        self.group.wait_ready(servers, START_DEADLINE_S)


def vllm_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]


def flags() -> list[str]:
    return ["--host", HOST, *machine.server_flags()]


def token_env() -> dict[str, str]:
    return {TOKEN_ENV: TOKEN}
