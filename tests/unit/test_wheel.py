"""The wheel, installed away from the checkout beside nothing but what it requires: its files, metadata and commands."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from sample import write_pair

from vllm_wanspec import __version__

ROOT = Path(__file__).parents[2]
NOT_BUILT_FROM = (
    ".git",
    ".venv",
    ".overlay",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    "*.safetensors",
)
#: Makes imports of the named modules fail, also in a process that this one turns into.
SITECUSTOMIZE = 'import os, sys\nsys.modules.update(dict.fromkeys(os.environ["HIDDEN"].split(",")))\n'
#: What `vllm serve` was told.
STAND_IN = 'import json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ.get("VLLM_PLUGINS")]))\n'
#: How many modules there are, and of which other module each that fails is in want.
IMPORT_ALL = """
import importlib, json, pkgutil, vllm_wanspec
names = [found.name for found in pkgutil.walk_packages(vllm_wanspec.__path__, "vllm_wanspec.")]
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = error.name
print(json.dumps([len(names), failed]))
"""
DEADLINE_S = 60
COMMANDS = ["bench", "demo", "drafter", "report", "serve", "trace", "wan"]
EACH_HELP = """
import sys
from vllm_wanspec.cli.main import app
for name in sys.argv[1:]:
    app([name, "--help"], prog_name="wanspec", standalone_mode=False)
"""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in the checkout would leave its files there, and find those of earlier ones."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_BUILT_FROM))
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode("utf-8"))


def required(requirements: list[str]) -> set[str]:
    """Names of the distributions that these need, themselves included, without extras."""
    names: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name not in names and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            names.add(name)
            waiting += map(Requirement, distribution(name).requires or ())
    return names


@dataclass(frozen=True)
class Place:
    """Where the wheel is installed, and what is to be hidden there so that only what it requires is left."""

    folder: Path
    outside: Path
    hidden: frozenset[str]

    def environment(self, *more: Path, shown: tuple[str, ...] = ()) -> dict[str, str]:
        paths = [self.folder / "target", self.folder / "hiding", *more]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("WANSPEC_", "VLLM_"))}
        return env | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HIDDEN": ",".join(sorted(self.hidden - set(shown))),
        }

    def python(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", *arguments]
        return subprocess.run(
            command,
            cwd=self.outside,
            env=env or self.environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def wanspec(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "vllm_wanspec.cli.main", *arguments, env=env)


@pytest.fixture(scope="session")
def place(wheel: Path, metadata: Message, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    pip("install", "--no-compile", "--target", str(folder / "target"), str(wheel))
    (folder / "hiding").mkdir()
    (folder / "hiding" / "sitecustomize.py").write_text(SITECUSTOMIZE, "utf-8")
    inner = folder / "vllm" / "vllm" / "entrypoints" / "cli"
    inner.mkdir(parents=True)
    for package in (inner, *inner.parents[:2]):
        (package / "__init__.py").touch()
    (inner / "main.py").write_text(STAND_IN, "utf-8")
    (folder / "outside").mkdir()
    kept = required(metadata.get_all("Requires-Dist", []))
    owners = packages_distributions()
    hidden = {
        module
        for module, names in owners.items()
        if module != "vllm_wanspec" and not {re.sub(r"[-_.]+", "-", name).lower() for name in names} & kept
    }
    assert {"vllm", "torch", "matplotlib", "pytest"} <= hidden
    return Place(folder, folder / "outside", frozenset(hidden))


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = (path for path in (ROOT / "vllm_wanspec").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert names == {path.relative_to(ROOT).as_posix() for path in package}
    assert {"vllm_wanspec/py.typed", "vllm_wanspec/trace/page.html", "vllm_wanspec/trace/page.css"} <= names


def test_the_metadata(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("vllm-wanspec", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())


def test_former_names_of_extras_still_install_what_they_did(metadata: Message) -> None:
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]

    def of(extra: str) -> set[str]:
        return {str(line).split(";")[0] for line in wanted if line.marker and line.marker.evaluate({"extra": extra})}

    assert {Requirement(line).name for line in of("lab")} == {"matplotlib", "py-spy"}
    assert of("plots") == of("profile") == {"vllm-wanspec[lab]"}


def test_the_long_description_has_no_link_that_needs_the_checkout(metadata: Message) -> None:
    text = metadata.get_payload()
    assert isinstance(text, str)
    targets = re.findall(r"\]\(([^)]*)\)", text)
    [repository] = (line.split(", ")[1] for line in metadata.get_all("Project-URL", []) if line.startswith("Homepage"))
    ours = [target.removeprefix(repository) for target in targets if target.startswith(repository)]
    assert len(ours) == len(re.findall(r"\]\((?!https?:|#)", (ROOT / "README.md").read_text("utf-8"))) > 10
    assert all(target.startswith(("https://", "#")) for target in targets)
    for target in ours:
        found = re.fullmatch(rf"/(blob|raw)/v{re.escape(__version__)}/([^#]+)(#.*)?", target)
        assert found, target
        assert (ROOT / found[2]).exists(), target
        assert (found[1] == "raw") == found[2].endswith(".png")


def test_which_links_are_rewritten() -> None:
    spec = importlib.util.spec_from_file_location("wanspec_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    text = "[a](docs/a.md#b), ![two\nlines](x.png), [c](#c), [d](https://d.example/e), [e](mailto:e@f)"
    assert setup.absolute_links(text, "https://r", "v1") == (
        "[a](https://r/blob/v1/docs/a.md#b), ![two\nlines](https://r/raw/v1/x.png), [c](#c), [d](https://d.example/e), "
        "[e](mailto:e@f)"
    )


def test_version_and_help(place: Place) -> None:
    script = [str(place.folder / "target" / "bin" / "wanspec"), "--version"]
    done = subprocess.run(
        script, cwd=place.outside, env=place.environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"wanspec {__version__}\n"), done.stderr
    assert place.wanspec("--version").stdout == done.stdout
    where = place.python("-c", "import vllm_wanspec; print(vllm_wanspec.__file__)").stdout
    assert where.startswith(str(place.folder / "target"))
    done = place.wanspec("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE) == COMMANDS
    done = place.python("-c", EACH_HELP, *COMMANDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^Usage: wanspec (\w+)", done.stdout, re.MULTILINE) == COMMANDS


def test_all_but_route_and_kernel_imports_beside_the_base_install(place: Place) -> None:
    done = place.python("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    count, failed = json.loads(done.stdout)
    assert count > 90
    # vLLM brings both.
    assert failed == {
        "vllm_wanspec.drafter.routes": "fastapi",
        "vllm_wanspec.controller.mrv2.kernel": "triton",
        "vllm_wanspec.controller.mrv2.binding": "torch",
        "vllm_wanspec.controller.mrv2.speculator": "torch",
        "vllm_wanspec.lab.target.played_async": "torch",
    }


@pytest.mark.parametrize("command", ["serve", "drafter"])
def test_servers_say_that_vllm_is_missing(place: Place, command: str) -> None:
    (place.outside / "wanspec.yaml").write_text('draft_endpoints: [{name: eu, url: "http://127.0.0.1:8101"}]\n')
    more = ["--wanspec", "wanspec.yaml"] if command == "serve" else ["--host", "127.0.0.1"]
    done = place.wanspec(command, "some-model", *more)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "vLLM is not installed" in done.stderr
    # And with something called vLLM they turn into it.
    done = place.wanspec(
        command, "some-model", *more, "--port", "1", env=place.environment(place.folder / "vllm", shown=("vllm",))
    )
    assert done.returncode == 0, done.stderr
    arguments, plugins = json.loads(done.stdout)
    assert arguments[:2] == ["serve", "some-model"]
    assert arguments[-2:] == ["--port", "1"]
    assert (plugins is not None and "wanspec" in plugins.split(",")) == (command == "drafter")


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (("demo",), ("vLLM", "--models DIR")),
        (("bench",), ("vLLM", "--target, --draft and --prompts")),
        (("bench", "--markdown", "x.md"), ("vLLM", "--target, --draft and --prompts", "vllm-wanspec[lab]")),
    ],
)
def test_measuring_says_what_it_needs(place: Place, arguments: tuple[str, ...], needed: tuple[str, ...]) -> None:
    done = place.wanspec(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"wanspec {arguments[0]}: ")
    assert [part for part in needed if part not in done.stderr] == []
    assert done.stderr.count("; ") == len(needed) - 1


def test_trace_draws_its_page(place: Place, tmp_path: Path) -> None:
    done = place.wanspec("trace", *(str(path) for path in write_pair(tmp_path)), "--html", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    assert "2 requests" in done.stdout
    page = (tmp_path / "page.html").read_text("utf-8")
    assert '"id":"req-a"' in page
    for name in ("page.css", "page.js", "page_time.js"):
        assert (ROOT / "vllm_wanspec" / "trace" / name).read_text("utf-8").strip() in page


@pytest.fixture
def proxy(place: Place) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-P", "-m", "vllm_wanspec.cli.main", "wan"]
    command += ["--listen", "127.0.0.1:0", "--to", "127.0.0.1:9", "--rtt-ms", "1"]
    with subprocess.Popen(
        command,
        cwd=place.outside,
        env=place.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_the_wan_proxy_runs_until_it_is_told_to_stop(proxy: "subprocess.Popen[str]") -> None:
    assert proxy.stdout is not None
    assert proxy.stdout.readline().startswith("wan proxy: listening on 127.0.0.1:")
    proxy.send_signal(signal.SIGTERM)
    out, err = proxy.communicate(timeout=DEADLINE_S)
    assert (proxy.returncode, err) == (0, "")
    assert out.startswith("wan proxy: stopped")
