"""Child processes that are servers: start, wait until ready, and never leave one behind.

Each server leads its own process group, so that stopping it also stops what it started (vLLM's
engine processes), and Ctrl-C in the terminal reaches only us.  The kernel ends a server whose
starter died without a chance to stop it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from vllm_wanspec.errors import WanspecError
from vllm_wanspec.lab.harness.cpu import processes

HOST = "127.0.0.1"
POLL_S = 0.1
PROBE_TIMEOUT_S = 1.0
STOP_GRACE_S = 10.0
KILL_GRACE_S = 5.0
LOG_TAIL_LINES = 15
LOG_TAIL_BYTES = 16_384
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Runs in the child before the server's program: asks the kernel for SIGTERM (15) when the starter
#: dies (PR_SET_PDEATHSIG is 1) and pins the process.  A program of its own, because Python code
#: between fork and exec may deadlock beside threads.
LAUNCHER = """
import ctypes, os, sys
starter, core, *argv = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(starter):
        sys.exit("the starter is gone")
    if core:
        try:
            os.sched_setaffinity(0, {int(core)})
        except OSError as error:
            print(f"cannot pin to CPU {core}: {error}", flush=True)
try:
    os.execvp(argv[0], argv)
except OSError as error:
    sys.exit(f"cannot run {argv[0]}: {error.strerror}")
"""


class ServerError(WanspecError):
    """A server that we started ended by itself or did not become ready in time."""


@dataclass(frozen=True)
class ServerSpec:
    """How to start one server.

    Args:
        name: What people call it, in messages and as the name of its log file.
        argv: Program and arguments.
        port: Port on 127.0.0.1 that it will listen on.
        env: Its whole environment; None takes this process's.
        core: CPU number to pin it to; None does not pin.
        health_path: Path that answers 200 when it is ready; None means that accepting a TCP
            connection is enough.
    """

    name: str
    argv: Sequence[str]
    port: int
    env: dict[str, str] | None = None
    core: int | None = None
    health_path: str | None = "/health"


class Server:
    """One started server.

    Args:
        spec: How to start it.
        log_path: File that receives its output; overwritten.
    """

    def __init__(self, spec: ServerSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.started_s = time.monotonic()
        self.ready_after_s: float | None = None
        core = "" if spec.core is None else str(spec.core)
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), core, *spec.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=spec.env,
                process_group=0,
            )

    @property
    def name(self) -> str:
        """The spec's name."""
        return self.spec.name

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its process group."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Base URL of its HTTP interface."""
        return f"http://{HOST}:{self.spec.port}"

    def check_alive(self) -> None:
        """Raise ServerError, with the end of its log, if the server has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"{self.name} ended by itself ({_exit_text(code)}){self.log_hint()}")

    def probe(self) -> bool:
        """Whether the server answers; takes at most about a second."""
        if self.spec.health_path is None:
            return _accepts(self.spec.port)
        return _answers(self.spec.port, self.spec.health_path)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """Return the last lines of its output."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.rstrip().splitlines()[-lines:])

    def signal(self, number: int) -> None:
        """Send a signal to the server and everything it started; nothing if all of it has ended."""
        if self.is_running():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def is_running(self) -> bool:
        """Whether the server or anything in its process group still runs."""
        return self._process.poll() is None or _group_runs(self.pid)

    def log_hint(self) -> str:
        """Return the end of a message: the last lines of its output and where they stand."""
        tail = self.log_tail()
        return f"; end of {self.log_path}:\n{tail}" if tail else f"; {self.log_path} is empty"


class ServerGroup:
    """Starts servers and stops all of them on leaving the ``with`` block, whatever ended it.

    Inside the block SIGTERM and SIGHUP raise SystemExit and Ctrl-C raises KeyboardInterrupt, never
    while a server is being started or stopped.  Use it in the main thread; elsewhere signals are
    left alone.

    Args:
        log_dir: Existing folder for the servers' log files.
        stop_grace_s: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, log_dir: Path, stop_grace_s: float = STOP_GRACE_S) -> None:
        self.servers: list[Server] = []
        self._log_dir = log_dir
        self._stop_grace_s = stop_grace_s
        self._held = False
        self._pending_signal: int | None = None
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING_SIGNALS:
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = True
        try:
            self.stop_all()
        finally:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            self._held = False
        if error is None:
            self._raise_pending()

    def start(self, spec: ServerSpec) -> Server:
        """Start a server; it is not ready yet.

        Raises:
            ServerError: The program cannot be started.
        """
        self._held = True
        try:
            server = Server(spec, self._log_dir / f"{spec.name}.log")
            self.servers.append(server)
        except (OSError, subprocess.SubprocessError) as error:
            raise ServerError(f"cannot start {spec.name} ({spec.argv[0]}): {error}") from error
        finally:
            self._held = False
        self._raise_pending()
        return server

    def wait_ready(
        self,
        servers: Iterable[Server],
        deadline_s: float,
        on_ready: Callable[[Server], None] = lambda server: None,
    ) -> None:
        """Wait until each server answers.

        Args:
            servers: Those to wait for.
            deadline_s: Seconds since its start after which a server is given up.
            on_ready: Called once per server; its ``ready_after_s`` is set.

        Raises:
            ServerError: One ended or was not ready in time; the end of its log is in the message.
        """
        waiting = list(servers)
        while waiting:
            for server in list(waiting):
                server.check_alive()
                age_s = time.monotonic() - server.started_s
                if server.probe():
                    server.ready_after_s = age_s
                    waiting.remove(server)
                    on_ready(server)
                elif age_s > deadline_s:
                    raise ServerError(f"{server.name} was not ready after {deadline_s:.0f} s{server.log_hint()}")
            if waiting:
                time.sleep(POLL_S)

    def check_alive(self, within_s: float = 0.0) -> None:
        """Raise ServerError if any server has ended, or does so within some seconds."""
        deadline_s = time.monotonic() + within_s
        while True:
            for server in self.servers:
                server.check_alive()
            if time.monotonic() >= deadline_s:
                return
            time.sleep(POLL_S)

    def stop_all(self) -> None:
        """Stop every server: SIGTERM to its group, SIGKILL to what is left after the grace time."""
        for number, grace_s in ((signal.SIGTERM, self._stop_grace_s), (signal.SIGKILL, KILL_GRACE_S)):
            running = [server for server in self.servers if server.is_running()]
            for server in running:
                server.signal(number)
            deadline_s = time.monotonic() + grace_s
            while any(server.is_running() for server in running) and time.monotonic() < deadline_s:
                time.sleep(POLL_S / 2)
        self.servers.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._pending_signal = number
        if not self._held:
            self._raise_pending()

    def _raise_pending(self) -> None:
        number, self._pending_signal = self._pending_signal, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number is not None:
            raise SystemExit(128 + number)


def wanspec_command(*arguments: str) -> list[str]:
    """Return the argv that runs ``wanspec ARGUMENTS`` with this Python."""
    return [sys.executable, "-m", "vllm_wanspec.cli.main", *arguments]


def service_command(port: int, *arguments: str) -> list[str]:
    """Return the argv that runs a drafter without a model on a device, with this Python."""
    return [sys.executable, "-m", "vllm_wanspec.sim.service", "--port", str(port), *arguments]


def free_ports(count: int) -> list[int]:
    """Return different TCP ports that were free on 127.0.0.1 a moment ago."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for held_socket in sockets:
            held_socket.bind((HOST, 0))
        return [int(held_socket.getsockname()[1]) for held_socket in sockets]


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _group_runs(group: int) -> bool:
    """Whether a process of the group is alive; zombies, which nobody may ever reap, do not count."""
    if Path("/proc/self/stat").exists():
        return any(state not in ("Z", "X") for _, _, state in processes(group))
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
