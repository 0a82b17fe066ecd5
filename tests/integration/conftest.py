"""The servers that the integration tests share: started when first asked for, stopped before other tests run."""

import json
import urllib.request
from collections.abc import Iterator

import pytest

from vllm_wanspec.lab.harness.models import DemoModels
from vllm_wanspec.lab.harness.servers import ServerGroup

from .fleet import MODEL_NAME, REMOTE_ALONE, V1, Drafter, Fleet, Target, find_test_models, on_runner, read_prompts
from .peers import Peers, serve_peers
from .workload import PlainTruth


@pytest.fixture(scope="package")
def models() -> DemoModels:
    return find_test_models()


@pytest.fixture(scope="package")
def fleet(models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("servers")
    with ServerGroup(folder) as group:
        yield Fleet(group, models, folder)


@pytest.fixture(scope="package")
def pair(fleet: Fleet) -> tuple[Drafter, Target, Target]:
    """Drafter, plain target, target with remote drafts: started side by side, since starting takes long."""
    drafter = fleet.drafter()
    plain = fleet.plain()
    wanspec = fleet.wanspec("wanspec", {"draft_endpoints": [{"name": "main", "url": drafter.url}]} | REMOTE_ALONE)
    fleet.wait_ready(drafter.server, plain.server, wanspec.server)
    return drafter, plain, wanspec


@pytest.fixture
def drafter(pair: tuple[Drafter, Target, Target]) -> Drafter:
    pair[0].server.check_alive()
    return pair[0]


@pytest.fixture(scope="package")
def runner(request: pytest.FixtureRequest) -> str:
    """The target's model runner; V1 where a test does not say `EACH_RUNNER`."""
    return getattr(request, "param", V1)


@pytest.fixture(scope="package")
def target(runner: str, fleet: Fleet, pair: tuple[Drafter, Target, Target]) -> Iterator[Target]:
    """A target with remote drafts on a model runner; others than V1's end when their tests have run."""
    if runner == V1:
        yield pair[2]
        return
    config = {"draft_endpoints": [{"name": "main", "url": pair[0].url}]} | REMOTE_ALONE
    found = fleet.wanspec(f"wanspec-{runner}", config, **on_runner(runner))
    fleet.wait_ready(found.server)
    yield found
    fleet.stop(found.server)


@pytest.fixture
def wanspec(target: Target) -> Target:
    target.server.check_alive()
    return target


@pytest.fixture(scope="package")
def plain(pair: tuple[Drafter, Target, Target]) -> PlainTruth:
    return PlainTruth(pair[1])


@pytest.fixture(scope="package")
def prompt_texts(models: DemoModels) -> list[str]:
    return read_prompts(models)


@pytest.fixture(scope="package")
def prompts(prompt_texts: list[str], plain: PlainTruth) -> list[tuple[int, ...]]:
    """The held-out prompts as token ids, in the order of their file."""
    return [tokenize(plain.target.url, text) for text in prompt_texts]


@pytest.fixture(scope="package")
def peers(pair: tuple[Drafter, Target, Target]) -> Iterator[Peers]:
    with serve_peers(pair[0].url) as peers:
        yield peers


@pytest.fixture(scope="package")
def small(runner: str, fleet: Fleet, pair: tuple[Drafter, Target, Target], peers: Peers) -> Iterator[Target]:
    found = fleet.small(pair[0].url, peers.urls, runner)
    fleet.wait_ready(found.server)
    yield found
    fleet.stop(found.server)


def tokenize(url: str, text: str) -> tuple[int, ...]:
    body = json.dumps({"model": MODEL_NAME, "prompt": text}).encode()
    request = urllib.request.Request(url + "/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return tuple(json.load(response)["tokens"])
