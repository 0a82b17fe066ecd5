"""Server processes, with real ones: tiny Python programs that listen, fail, hang or start children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.servers import Server, ServerError, ServerGroup, ServerSpec, free_ports, wanspec_command

LONG_S = 30.0
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="uses /proc or prctl")

HTTP_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("serving", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
LEAVES_A_CHILD = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
"""
STARTER = """
import sys, time
from pathlib import Path
from vllm_wanspec.lab.harness.servers import ServerGroup, ServerSpec
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
with ServerGroup(Path(sys.argv[1])) as group:
    print(group.start(ServerSpec("a", sleeper, 1)).pid, group.start(ServerSpec("b", sleeper, 1)).pid, flush=True)
    time.sleep(600)
"""


def spec(code: str, *arguments: str, name: str = "thing", port: int = 1, **more: object) -> ServerSpec:
    return ServerSpec(name, [sys.executable, "-c", code, *arguments], port, **more)  # type: ignore[arg-type]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never came true"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def first_line(server: Server) -> str:
    wait_for(lambda: "\n" in server.log_path.read_text())
    return server.log_path.read_text().splitlines()[0]


def test_a_server_becomes_ready_and_is_stopped(tmp_path: Path) -> None:
    ready: list[str] = []
    (port,) = free_ports(1)
    with ServerGroup(tmp_path) as group:
        server = group.start(spec(HTTP_SERVER, str(port), port=port))
        group.wait_ready([server], LONG_S, lambda done: ready.append(done.name))
        assert ready == ["thing"]
        assert server.ready_after_s is not None
        assert server.url == f"http://127.0.0.1:{port}"
        assert server.log_tail().startswith("serving")
        group.check_alive()
    assert not server.is_running()


def test_a_wrong_health_path_is_not_ready_but_a_tcp_probe_is(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with ServerGroup(tmp_path) as group:
        server = group.start(spec(HTTP_SERVER, str(port), port=port, health_path=None))
        group.wait_ready([server], LONG_S)
        other = Server(spec(SLEEPER, port=port, name="other", health_path="/nothing"), tmp_path / "other.log")
        group.servers.append(other)
        assert not other.probe()


def test_a_server_that_ends_early_shows_the_end_of_its_log(tmp_path: Path) -> None:
    code = "import sys; print('\\n'.join(f'line {i}' for i in range(40))); sys.exit('no such model')"
    with pytest.raises(ServerError) as caught, ServerGroup(tmp_path) as group:
        group.wait_ready([group.start(spec(code))], LONG_S)
    message = str(caught.value)
    assert "thing ended by itself (exit status 1)" in message
    assert message.endswith("no such model")
    assert "line 39" in message
    assert "line 10\n" not in message


def test_a_server_killed_by_a_signal_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="SIGKILL"), ServerGroup(tmp_path) as group:
        group.wait_ready([group.start(spec("import os; os.kill(os.getpid(), 9)"))], LONG_S)


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="not ready after 0 s"), ServerGroup(tmp_path) as group:
        server = group.start(spec(SLEEPER))
        first_line(server)
        group.wait_ready([server], 0.2)
    assert not server.is_running()


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="cannot run /no/such/program: No such file"), ServerGroup(tmp_path) as group:
        group.wait_ready([group.start(ServerSpec("thing", ["/no/such/program"], 1))], LONG_S)


@linux_only
def test_a_stubborn_server_and_its_child_are_killed(tmp_path: Path) -> None:
    with ServerGroup(tmp_path, stop_grace_s=0.2) as group:
        server = group.start(spec(STUBBORN))
        child = int(first_line(server))
        assert not is_gone(child)
    assert is_gone(server.pid)
    wait_for(lambda: is_gone(child))


@linux_only
def test_what_a_dead_server_left_behind_is_stopped(tmp_path: Path) -> None:
    with ServerGroup(tmp_path) as group:
        server = group.start(spec(LEAVES_A_CHILD))
        child = int(first_line(server))
        with pytest.raises(ServerError):
            wait_for(lambda: server.check_alive() is not None)
        assert server.is_running()
    wait_for(lambda: is_gone(child))


def test_an_error_in_the_block_stops_the_servers(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ServerGroup(tmp_path) as group:
        server = group.start(spec(SLEEPER))
        raise ZeroDivisionError
    assert not server.is_running()


@linux_only
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)])
def test_a_signal_to_the_starter_leaves_no_server_behind(tmp_path: Path, number: signal.Signals, status: int) -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pids = [int(word) for word in starter.stdout.readline().split()]
        assert len(pids) == 2
        starter.send_signal(number)
        assert starter.wait(LONG_S) == status
    wait_for(lambda: all(map(is_gone, pids)))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of Ctrl-C: a test run in the background starts with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@linux_only
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_the_servers_and_raises_keyboard_interrupt(tmp_path: Path) -> None:
    started = []
    with pytest.raises(KeyboardInterrupt), ServerGroup(tmp_path) as group:
        started = [group.start(spec(SLEEPER, name=name)) for name in "ab"]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(LONG_S)
    assert len(started) == 2
    assert not any(server.is_running() for server in started)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_stopping_waits_until_everything_is_stopped(tmp_path: Path) -> None:
    class Interrupted(ServerGroup):
        def stop_all(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().stop_all()

    with pytest.raises(KeyboardInterrupt), Interrupted(tmp_path) as group:
        server = group.start(spec(SLEEPER))
    assert not server.is_running()


@linux_only
def test_a_server_is_pinned_to_its_core_and_gets_its_environment(tmp_path: Path) -> None:
    core = machine.cores()[-1]
    code = "import os; print(sorted(os.sched_getaffinity(0)), os.environ.get('COLOUR'), flush=True)"
    with ServerGroup(tmp_path) as group:
        server = group.start(spec(code, core=core, env={**os.environ, "COLOUR": "red"}))
        assert first_line(server) == f"[{core}] red"


def test_free_ports_are_different() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5


def test_our_commands_run_in_this_python() -> None:
    assert wanspec_command("wan", "--rtt-ms", "20")[0] == sys.executable
    assert wanspec_command("wan", "--rtt-ms", "20")[-3:] == ["wan", "--rtt-ms", "20"]


def test_a_small_machine_gets_flags_that_a_gpu_machine_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANSPEC_TOKEN", "secret")
    monkeypatch.setenv("WANSPEC_TOKEN_FILE", "/tokens")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    small, env = machine.server_flags(), machine.server_env(core=3)
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    large = machine.server_flags()
    assert "--enforce-eager" in small
    assert "--enforce-eager" not in large
    for flags in (small, large):
        assert flags[flags.index("--dtype") + 1] == "float32"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "3"
    assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "PATH" in env
    assert not {"WANSPEC_TOKEN", "WANSPEC_TOKEN_FILE", "VLLM_PLUGINS"} & set(env)
    assert "VLLM_CPU_KVCACHE_SPACE" not in machine.server_env()
    assert machine.pin_cores(gpu=True) == (None, None)
