"""The package as installed: its imports without vLLM and torch, and its entry points."""

import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest

import vllm_wanspec
from vllm_wanspec.errors import (
    ConfigError,
    RemoteProtocolError,
    UnsupportedError,
    WanspecError,
)

WITHOUT_VLLM = """
import sys
for name in ("vllm", "torch", "transformers"):
    sys.modules[name] = None  # makes every import of it fail
import importlib
for name in {names!r}:
    importlib.import_module(name)
print("good")
"""

BASE = [
    "vllm_wanspec",
    "vllm_wanspec.config",
    "vllm_wanspec.errors",
    "vllm_wanspec.eventlog",
    "vllm_wanspec.core.tree",
    "vllm_wanspec.core.messages",
    "vllm_wanspec.core.learned.calibration",
    "vllm_wanspec.core.controller",
    "vllm_wanspec.core.turnaround",
    "vllm_wanspec.core.drafter",
    "vllm_wanspec.core.events",
    "vllm_wanspec.core.policy.expansion",
    "vllm_wanspec.core.learned.estimates",
    "vllm_wanspec.core.policy.lateness",
    "vllm_wanspec.core.policy.length",
    "vllm_wanspec.core.states",
    "vllm_wanspec.controller.link",
    "vllm_wanspec.controller.choice",
    "vllm_wanspec.controller.drafting",
    "vllm_wanspec.controller.waiting",
    "vllm_wanspec.controller.pool",
    "vllm_wanspec.controller.v1.proposer",
    "vllm_wanspec.controller.v1.hooks",
    "vllm_wanspec.controller.mrv2.memory",
    "vllm_wanspec.controller.mrv2.walk",
    "vllm_wanspec.drafter.admission",
    "vllm_wanspec.drafter.connection",
    "vllm_wanspec.drafter.drain",
    "vllm_wanspec.drafter.engines",
    "vllm_wanspec.drafter.host",
    "vllm_wanspec.drafter.metrics",
    "vllm_wanspec.drafter.ports",
    "vllm_wanspec.cli.main",
    "vllm_wanspec.plugin",
]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_the_base_install_imports_without_vllm_and_torch() -> None:
    done = python(WITHOUT_VLLM.format(names=BASE))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "good\n"


def test_the_command_line_runs_without_vllm_and_torch() -> None:
    code = WITHOUT_VLLM.format(names=[]) + (
        "from vllm_wanspec.cli.main import run\nsys.argv = ['wanspec', '--help']\nrun()\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "drafter" in done.stdout


def test_the_core_brings_no_io() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\n"
        "import vllm_wanspec.core.events, vllm_wanspec.core.states\n"  # and with them all others
        "print(sorted({'aiohttp', 'asyncio', 'threading', 'random', 'vllm', 'torch'} & (set(sys.modules) - before)))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("group", "value"),
    [
        ("console_scripts", "vllm_wanspec.cli.main:run"),
        ("vllm.general_plugins", "vllm_wanspec.plugin:register"),
        ("vllm.endpoint_plugins", "vllm_wanspec.drafter.routes:WanspecRoutes"),
    ],
)
def test_entry_points(group: str, value: str) -> None:
    [entry] = entry_points(group=group, name="wanspec")
    assert entry.value == value
    assert callable(entry.load())


def test_the_proposer_is_found_by_the_name_that_vllm_is_given() -> None:
    from vllm_wanspec.config import PROPOSER
    from vllm_wanspec.controller.v1.proposer import RemoteProposer

    module, name = PROPOSER.rsplit(".", 1)
    assert module == "vllm_wanspec"
    assert getattr(vllm_wanspec, name) is RemoteProposer


def test_there_is_nothing_else_to_find() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        vllm_wanspec.Nothing  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    assert vllm_wanspec.__version__ == version("vllm-wanspec")


def test_all_errors_have_one_base() -> None:
    for kind in (ConfigError, UnsupportedError, RemoteProtocolError):
        assert issubclass(kind, WanspecError)
