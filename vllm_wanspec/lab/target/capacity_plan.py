"""The capacity bench's settings: under which loads clients are served, what is compared there, and its servers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_wanspec.emulate.pacing import DRAFT_PACING_ENV, Pacing
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import (
    DRAFT_PACE,
    NAMED,
    TARGET_PACE,
    lean,
    plain_command,
    vllm_spec,
    wan_spec,
    write_config,
)
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.servers import HOST, ServerSpec, free_ports, wanspec_command
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE, colocated_command, remote_command

#: Remote drafting with a number of drafts per step that varies, as users have it; `REMOTE` verifies what there is.
ADAPTIVE = "remote_adaptive"
DRAFTER = "drafter"
BENCH, SATURATED = "bench", "saturated"
#: A step's time is nearly proportional to its rows; a round of drafting costs a client about 0.45 verifications.
SATURATED_PACE = Pacing(5.0, 4.0)
SATURATED_DRAFT_PACE = Pacing(4.0, 1.0)
FIXED_LENGTH = {"policy": "fixed", "shut_off": False}


@dataclass(frozen=True, slots=True)
class Load:
    """Paces under which a target serves numbers of clients, and what a step takes there.

    Attributes:
        name: What people call it.
        target: Duration of a target forward.
        draft: Duration of a co-located draft forward.
        clients: Numbers of clients, rising.
    """

    name: str
    target: Pacing
    draft: Pacing
    clients: tuple[int, ...]

    def scaled(self, factor: float) -> Load:
        """Return the load with forwards that take ``factor`` times as long."""
        return dataclasses.replace(self, target=self.target.scaled(factor), draft=self.draft.scaled(factor))

    def verifying_ms(self, clients: float, gamma: float) -> float:
        """Return what the verification of γ drafts, on average, of each client takes: t_v of all of them."""
        return self.target.base_ms + self.target.per_token_ms * clients * (gamma + 1)

    def drafting_ms(self, clients: float, gamma: int) -> float:
        """Return what drafting γ tokens for each client takes beside the target: γ·t_d of all of them.

        Of the γ forwards of vLLM's draft model the first has γ + 2 rows per client, what was verified and the token
        after it; each of the others has one (vLLM's ``SpecDecodeBaseProposer``).
        """
        rows = 0 if gamma == 0 else (gamma + 2) + (gamma - 1)
        return self.draft.base_ms * gamma + self.draft.per_token_ms * clients * rows

    def identity(self, clients: float, gamma: int) -> float:
        """Return 1 + γ·t_d/t_v of so many clients (Speculation at a Distance; both times as their batch takes them)."""
        return 1.0 + self.drafting_ms(clients, gamma) / self.verifying_ms(clients, gamma)

    def capacity_ratio(self, step_ms: float, gamma: int) -> float | None:
        """Return how many times the clients fit into a step of a given duration if their drafts come from elsewhere.

        Both durations are affine in the clients (own derivation); as the constant parts vanish, this becomes
        `identity`. None where a step with co-located drafts always takes longer.
        """
        alone = (step_ms - self.verifying_ms(0, gamma)) / (self.verifying_ms(1, gamma) - self.verifying_ms(0, gamma))
        fixed_ms = self.verifying_ms(0, gamma) + self.drafting_ms(0, gamma)
        each_ms = self.verifying_ms(1, gamma) + self.drafting_ms(1, gamma) - fixed_ms
        return alone / ((step_ms - fixed_ms) / each_ms) if step_ms > fixed_ms else None

    def as_json(self) -> dict[str, Any]:
        """Return its settings."""
        paces = {"target_pace": self.target.setting, "draft_pace": self.draft.setting}
        return {"name": self.name, **paces, "clients": list(self.clients)}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to draft.

    Attributes:
        kind: `PLAIN`, `COLOCATED`, `REMOTE` or `ADAPTIVE`.
        gamma: Draft tokens per step, at most; 0 for `PLAIN`.
    """

    kind: str
    gamma: int = 0

    @property
    def name(self) -> str:
        """Of its server."""
        return f"{self.kind}-{self.gamma}" if self.gamma else self.kind

    @property
    def is_remote(self) -> bool:
        """Whether its drafts cross the emulated WAN."""
        return self.kind in (REMOTE, ADAPTIVE)


@dataclass(frozen=True, slots=True)
class CapacityOptions:
    """The bench's settings, as its command explains them; paces and round trips before ``time_scale``."""

    loads: tuple[Load, ...] = (
        Load(BENCH, TARGET_PACE, DRAFT_PACE, (1, 2, 4, 8, 16, 32)),
        Load(SATURATED, SATURATED_PACE, SATURATED_DRAFT_PACE, (1, 2, 4, 8, 16)),
    )
    remote_draft_pace: Pacing = DRAFT_PACE
    gammas: tuple[int, ...] = (2, 4)
    rtt_ms: tuple[float, ...] = (0.0, 30.0)
    prompts: int = 8
    max_tokens: int = 24
    time_scale: float = 1.5
    models: Path | None = None

    def __post_init__(self) -> None:
        for load in self.loads:
            if load.clients != tuple(sorted(set(load.clients))) or not load.clients or load.clients[0] < 1:
                raise ConfigError(f"{load.name}: clients must be different numbers from 1, not {load.clients}")
            if not load.target.per_token_ms > 0.0:
                raise ConfigError(f"{load.name}: without a cost per token a target serves any number of clients")
        if not self.gammas or not all(1 <= gamma <= 64 for gamma in self.gammas):
            raise ConfigError("--gammas: draft tokens per step must be 1 to 64")
        if not self.rtt_ms or min(self.rtt_ms) < 0.0:
            raise ConfigError("--rtt-ms: round trips must be 0 or more")
        if not self.time_scale > 0.0:
            raise ConfigError(f"--time-scale: must be above 0, not {self.time_scale!r}")

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What is compared, plain vLLM first."""
        fixed = [Arm(kind, gamma) for kind in (COLOCATED, REMOTE) for gamma in self.gammas]
        return (Arm(PLAIN), *fixed, Arm(ADAPTIVE, max(self.gammas)))

    def as_json(self) -> dict[str, Any]:
        """Return them as the result file has them."""
        return {
            "loads": [load.as_json() for load in self.loads],
            "remote_draft_pace": self.remote_draft_pace.setting,
            "gammas": list(self.gammas),
            "rtt_ms": list(self.rtt_ms),
            "prompts": self.prompts,
            "max_tokens": self.max_tokens,
            "time_scale": self.time_scale,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The servers of one load.

    Attributes:
        specs: In the order in which to start them; arms by their name.
        metrics: By remote arm, where its controller serves its counters.
        stats: By server, its pacing statistics file.
        control_url: The WAN proxy's control API.
    """

    specs: tuple[ServerSpec, ...]
    metrics: dict[str, str]
    stats: dict[str, Path]
    control_url: str


def plan_servers(options: CapacityOptions, load: Load, models: DemoModels, folder: Path) -> Plan:
    """Lay out a drafter behind the WAN proxy and a target per arm; writes YAML files to ``folder``, which exists."""
    paced, (core, draft_core) = load.scaled(options.time_scale), machine.pin_cores()
    stats = {name: folder / f"{name}.pacing.json" for name in (DRAFTER, *(arm.name for arm in options.arms))}
    drafter_port, wan_port, control_port, *ports = free_ports(3 + 2 * len(options.arms))
    argv, pace = wanspec_command("drafter", str(models.draft)), options.remote_draft_pace.scaled(options.time_scale)
    drafter = lean(vllm_spec(DRAFTER, [*argv, *NAMED], drafter_port, draft_core, pace, stats[DRAFTER]))
    specs = [drafter, wan_spec(wan_port, drafter_port, 0.0, control_port)]
    metrics: dict[str, str] = {}
    for arm in options.arms:
        env: dict[str, str] = {}
        if arm.is_remote:
            metrics_port = ports.pop()
            sections: dict[str, Any] = {"fallback": []} | ({"length": FIXED_LENGTH} if arm.kind == REMOTE else {})
            config = write_config(folder / f"{arm.name}.yaml", wan_port, metrics_port, **sections)
            metrics[arm.name] = f"http://{HOST}:{metrics_port}/metrics"
            argv = remote_command(models.target, config, arm.gamma)
        elif arm.kind == COLOCATED:
            argv = colocated_command(models.target, models.draft, arm.gamma)
            env = {DRAFT_PACING_ENV: paced.draft.setting}
        else:
            argv = plain_command(str(models.target))
        spec = vllm_spec(arm.name, [*argv, *NAMED], ports.pop(), core, paced.target, stats[arm.name], env)
        specs.append(lean(spec))
    return Plan(tuple(specs), metrics, stats, f"http://{HOST}:{control_port}")
