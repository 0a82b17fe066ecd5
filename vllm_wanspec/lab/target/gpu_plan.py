"""What the GPU check compares: model runners, ways of drafting, and the servers of one comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_wanspec.config import PROPOSER
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.launch import NAMED, drafter_spec, plain_command, vllm_spec, write_config
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.servers import HOST, ServerSpec, free_ports
from vllm_wanspec.lab.target.kinds import COLOCATED, PLAIN, REMOTE, colocated_command, remote_command
from vllm_wanspec.lab.target.overhead_measure import NOBODY
from vllm_wanspec.lab.target.widened import needs_widening, widen

RUNNER_ENV = "VLLM_USE_V2_MODEL_RUNNER"
DEVICES_ENV = "CUDA_VISIBLE_DEVICES"
SHIPPED, DEAD, COLOCATED_GIVEN, REMOTE_GIVEN = "shipped", "dead", "draft_model_given", "remote_given"
#: Of these vLLM decides by itself how they are run.
AS_VLLM_HAS_IT = (SHIPPED, COLOCATED, COLOCATED_GIVEN)
DRAFTED_REMOTELY = (REMOTE, REMOTE_GIVEN)
#: Their texts are what the acceptance makes of them.
GIVEN = (COLOCATED_GIVEN, REMOTE_GIVEN)
DRAFTER_PLACES = 64
#: A server on a GPU compiles kernels and captures graphs as it starts, with speculation more of them since vLLM 0.33.
START_DEADLINE_S = 900.0
SYNTHETIC = "synthetic_acceptance_rates"


@dataclass(frozen=True, slots=True)
class Backend:
    """A model runner and a way of scheduling.

    Attributes:
        name: What people call it.
        v2: Whether it is Model Runner V2; None leaves it to vLLM.
        flags: Of ``vllm serve``.
    """

    name: str
    v2: bool | None
    flags: tuple[str, ...] = ()

    @property
    def env(self) -> dict[str, str]:
        """What it takes in a server's environment."""
        return {} if self.v2 is None else {RUNNER_ENV: str(int(self.v2))}

    def of(self, spec: ServerSpec) -> ServerSpec:
        """Return a server that is run so, whatever this shell or the flags of small machines say."""
        env = {name: value for name, value in (spec.env or {}).items() if name != RUNNER_ENV}
        return replace(spec, argv=[*spec.argv, *self.flags], env=env | self.env)


AS_SHIPPED = Backend("as shipped", None)
BACKENDS: Mapping[str, Backend] = {
    one.name: one
    for one in (
        Backend("v1", False, ("--no-async-scheduling",)),
        Backend("v2-sync", True, ("--no-async-scheduling",)),
        Backend("v2-async", True, ("--async-scheduling",)),
    )
}


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """The check's settings, as its command explains them."""

    backends: tuple[str, ...] = tuple(BACKENDS)
    tensor_parallel: tuple[int, ...] = (1, 2)
    prompts: int = 12
    max_tokens: int = 128
    gamma: int = 4
    at_a_time: tuple[int, ...] = (1, 8)
    rounds: int = 5
    acceptance: float = 0.7
    dtype: str = "float32"
    seed: int = 0
    models: Path | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.acceptance <= 1.0:
            raise ConfigError(f"--acceptance: {self.acceptance!r} is not a probability")
        if min(self.at_a_time) < 1 or min(self.tensor_parallel) < 1:
            raise ConfigError("--at-a-time, --tensor-parallel: expected numbers from 1")

    @property
    def acceptance_rates(self) -> list[float]:
        """The probability that a draft is accepted at least up to each position."""
        return [round(self.acceptance ** (place + 1), 6) for place in range(self.gamma)]


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """The servers of one comparison.

    Attributes:
        backend: How those run that are not as vLLM has it.
        tensor_parallel: GPUs of a target.
        given: Whether acceptance is given.
        specs: The drafter, then targets by their kind, in the order in which to start them.
        metrics: By kind, where its controller serves its counters.
    """

    backend: Backend
    tensor_parallel: int
    given: bool
    specs: Sequence[ServerSpec]
    metrics: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """The targets."""
        return [spec.name for spec in self.specs[1:]]


def usable_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs servers may use."""
    visible = environ.get(DEVICES_ENV)
    count = len(machine.gpus())
    return count if visible is None else min(count, len([one for one in visible.split(",") if one.strip()]))


def knows_given_acceptance() -> bool:
    """Whether the installed vLLM can accept drafts at a given rate; by its source, since importing it takes seconds."""
    spec = find_spec("vllm")
    file = Path(spec.origin).parent / "config" / "speculative.py" if spec and spec.origin else None
    return file is not None and file.is_file() and SYNTHETIC in file.read_text("utf-8")


def models_for(models: DemoModels, tensor_parallel: int, folder: Path) -> DemoModels:
    """Return the models whose target that many GPUs can share; a widened copy goes to ``folder``.

    Raises:
        ConfigError: They cannot, and no copy helps.
    """
    if not needs_widening(models.target, tensor_parallel):
        return models
    return replace(models, target=widen(models.target, tensor_parallel, folder / f"target-tp{tensor_parallel}"))


def plan_gpu(
    options: GpuOptions, backend: Backend, tensor_parallel: int, models: DemoModels, folder: Path, given: bool
) -> GpuPlan:
    """Lay out a drafter, and a target of each kind of one comparison; writes YAML files to ``folder``.

    Args:
        options: The check's settings.
        backend: How targets run that are not as vLLM has it.
        tensor_parallel: GPUs of a target.
        models: Those that so many GPUs can share.
        folder: Existing folder.
        given: Whether it is that of ways of drafting at a given acceptance, beside plain vLLM.
    """
    drafter = drafter_spec(models.draft, DRAFTER_PLACES, None)
    kinds = (PLAIN, *GIVEN) if given else (SHIPPED, PLAIN, COLOCATED, DEAD, REMOTE)
    ports, metrics, specs = free_ports(2 * len(kinds)), {}, [_apart(drafter, tensor_parallel)]
    for kind in kinds:
        config = None
        if kind in (DEAD, *DRAFTED_REMOTELY):
            port = ports.pop()
            metrics[kind] = f"http://{HOST}:{port}/metrics"
            # No prompt lookup in any arm: vLLM's own have none.
            config = write_config(folder / f"{kind}.yaml", NOBODY if kind == DEAD else drafter.port, port, fallback=[])
        argv = _command(kind, options, models, config)
        spec = vllm_spec(kind, [*argv, *NAMED], ports.pop(), None, None, None)
        flags = ["--dtype", options.dtype, "--tensor-parallel-size", str(tensor_parallel)]
        run_by = AS_SHIPPED if kind in AS_VLLM_HAS_IT else backend
        specs.append(run_by.of(replace(spec, argv=[*spec.argv, *flags])))
    return GpuPlan(backend, tensor_parallel, given, specs, metrics)


def _apart(drafter: ServerSpec, tensor_parallel: int) -> ServerSpec:
    """The drafter, on a GPU of its own where there is one that the targets do not use."""
    if usable_gpus() <= tensor_parallel:
        return drafter
    visible = os.environ.get(DEVICES_ENV)
    devices = [str(number) for number in range(usable_gpus())] if visible is None else visible.split(",")
    return replace(drafter, env=(drafter.env or {}) | {DEVICES_ENV: devices[tensor_parallel].strip()})


def _command(kind: str, options: GpuOptions, models: DemoModels, config: Path | None) -> list[str]:
    if kind in (SHIPPED, PLAIN):
        return plain_command(str(models.target))
    if kind == COLOCATED:
        return colocated_command(models.target, models.draft, options.gamma)
    if kind == COLOCATED_GIVEN:
        return _with_given(models, options, {"method": "draft_model", "model": str(models.draft)})
    assert config is not None
    if kind == REMOTE_GIVEN:
        argv = _with_given(models, options, {"method": "custom_class", "model": PROPOSER})
        return [*argv, "--additional-config", json.dumps({"wanspec": str(config.resolve())})]
    return remote_command(models.target, config, options.gamma)


def _with_given(models: DemoModels, options: GpuOptions, speculation: Mapping[str, Any]) -> list[str]:
    given = {"rejection_sample_method": "synthetic", SYNTHETIC: options.acceptance_rates}
    whole = {**speculation, "num_speculative_tokens": options.gamma, **given}
    return [*plain_command(str(models.target)), "--speculative-config", json.dumps(whole)]
