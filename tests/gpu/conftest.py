"""The servers of the tests on a GPU: those of the integration tests, run on a chosen model runner."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from integration.fleet import MODEL_NAME, Drafter, Fleet, Target, find_test_models, flags, read_prompts, vllm_command

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.servers import ServerGroup, ServerSpec, free_ports
from vllm_wanspec.lab.target.gpu_plan import START_DEADLINE_S, Backend, models_for, usable_gpus


@dataclass(frozen=True)
class GpuHouse:
    """Starts pairs of targets, plain and with remote drafts, that differ in nothing else."""

    drafter: Drafter
    models: DemoModels
    folder: Path

    @contextmanager
    def pair(self, backend: Backend, tensor_parallel: int) -> Iterator[tuple[Target, Target]]:
        """Plain vLLM and a target with remote drafts, as long as the block lasts."""
        folder = self.folder / f"{backend.name}-tp{tensor_parallel}"
        folder.mkdir()
        models = models_for(self.models, tensor_parallel, folder)
        shared = ["--tensor-parallel-size", str(tensor_parallel)]
        with ServerGroup(folder) as group:
            fleet = Fleet(group, models, folder)
            (port,) = free_ports(1)
            argv = vllm_command("serve", str(models.target), "--served-model-name", MODEL_NAME, "--port", str(port))
            spec = ServerSpec("plain", [*argv, *flags()], port, machine.server_env())
            plain = Target(group.start(backend.of(replace(spec, argv=[*spec.argv, *shared]))))
            group.wait_ready([plain.server], START_DEADLINE_S)  # vLLM measures free memory as it starts
            endpoints = {"draft_endpoints": [{"name": "main", "url": self.drafter.url}]}
            extra = [*shared, *backend.flags]
            ours = fleet.wanspec("wanspec", endpoints, extra_flags=extra, extra_env=backend.env)
            group.wait_ready([ours.server], START_DEADLINE_S)
            yield plain, ours


@pytest.fixture(scope="package")
def models() -> DemoModels:
    return find_test_models()


@pytest.fixture(scope="package")
def prompt_texts(models: DemoModels) -> list[str]:
    return read_prompts(models)


@pytest.fixture(scope="package")
def house(models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuHouse]:
    if not usable_gpus():
        pytest.fail("no GPU here (nvidia-smi lists none)", pytrace=False)
    folder = tmp_path_factory.mktemp("gpu")
    with ServerGroup(folder) as group:
        fleet = Fleet(group, models, folder)
        drafter = fleet.drafter()
        group.wait_ready([drafter.server], START_DEADLINE_S)
        yield GpuHouse(drafter, models, folder)
