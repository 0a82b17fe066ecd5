"""``wanspec trace``: what it prints and writes, and its one-line errors."""

import json
import sys
import time
from pathlib import Path

import pytest
from sample import CONTROLLER_S, header, plain_request, write, write_made_up, write_pair

from vllm_wanspec.cli import trace
from vllm_wanspec.cli.main import run


@pytest.fixture
def logs(tmp_path: Path) -> list[str]:
    return [str(path) for path in write_pair(tmp_path)]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wanspec", "trace", *arguments])
    with pytest.raises(SystemExit) as caught:
        run()
    code = caught.value.code
    return code if isinstance(code, int) else 0 if code is None else 1


def squeezed(line: str) -> str:
    return " ".join(line.split())


def test_the_table_and_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logs: list[str]
) -> None:
    assert call(monkeypatch, *logs) == 0
    title, head, served, plain, page = capsys.readouterr().out.splitlines()
    assert title.strip() == "2 requests"
    names = ("request", "drafter", "tokens", "steps", "tokens per step", "ms per token")
    assert squeezed(head) == " ".join([*names, "misses", "caught by a branch", "waits"])
    assert squeezed(served) == "req-a west, east 11 7 1.43 29.00 3 1 1 (6 ms)"
    assert squeezed(plain) == "req-b – 2 1 1.00 40.00 0 0 0"
    assert page == f"request req-a: {logs[0]}.html"
    assert '"id":"req-a"' in Path(f"{logs[0]}.html").read_text("utf-8")


def test_a_request_of_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logs: list[str], tmp_path: Path
) -> None:
    html, chrome = tmp_path / "b.html", tmp_path / "b.json"
    assert call(monkeypatch, *logs, "--request", "req-b", "--html", str(html), "--chrome", str(chrome)) == 0
    assert capsys.readouterr().out.splitlines() == [f"request req-b: {html}", f"Chrome trace of 1 request: {chrome}"]
    assert '"id":"req-b"' in html.read_text("utf-8")
    assert len([event for event in json.loads(chrome.read_text())["traceEvents"] if event["ph"] == "X"]) == 2
    assert not Path(f"{logs[0]}.html").exists()


def test_the_chrome_trace_of_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logs: list[str], tmp_path: Path
) -> None:
    chrome = tmp_path / "all.json"
    assert call(monkeypatch, *logs, "--chrome", str(chrome), "--no-text") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"request req-a: {logs[0]}.html",
        f"Chrome trace of 2 requests: {chrome}",
    ]
    names = {event["args"]["name"] for event in json.loads(chrome.read_text())["traceEvents"] if event["ph"] == "M"}
    assert {"req-a", "req-b"} <= names


def test_token_texts(monkeypatch: pytest.MonkeyPatch, logs: list[str], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 10, "?": 0}, unk_token="?"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert call(monkeypatch, *logs, "--tokenizer", str(tmp_path)) == 0
    assert '"texts":{"10":"hello"}' in Path(f"{logs[0]}.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl: cannot be read: No such file or directory"),
        (["empty.jsonl"], "empty.jsonl, line 1: expected a header"),
        (["wrong.jsonl"], "wrong.jsonl, line 1: expected a JSON object"),
        (["drafter.jsonl"], "drafter.jsonl: no events of a controller here; give its log too"),
        (
            ["controller.jsonl", "--request", "req-x"],
            "--request: 'req-x' is not a request of the log; there are 'req-a'",
        ),
        (["controller.jsonl", "--html", "no/page.html"], "no/page.html: cannot be written: No such file or directory"),
        (["controller.jsonl", "--chrome", "no/c.json"], "no/c.json: cannot be written: No such file or directory"),
    ],
)
def test_a_fault_is_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logs: list[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("wrong.jsonl").write_text("not a log\n")
    assert call(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"wanspec: {message}")
    assert err.count("\n") == 1


def test_no_logs_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch) == 2
    assert "EVENTS" in capsys.readouterr().err


def test_ids_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "log", [header("controller", CONTROLLER_S), *plain_request("\x1b[2J[bold]\nx\ud800")])
    assert call(monkeypatch, str(path)) == 0
    assert capsys.readouterr().out.count(r"\x1b[2J[bold]\nx\ud800") == 2


def test_progress_of_big_logs(monkeypatch: pytest.MonkeyPatch, logs: list[str]) -> None:
    monkeypatch.setattr(trace, "PROGRESS_FROM_BYTES", 1)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal then
    assert call(monkeypatch, *logs) == 0


def test_big_logs_are_read_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """About 20,000 lines; the bound is for a slow and busy machine."""
    paths = write_made_up(tmp_path, tokens=100)
    for path in paths:
        first, *lines = path.read_text("utf-8").splitlines()
        copies = [
            line.replace("cmpl-0000", f"cmpl-{n}").replace("00000000#1", f"{n}#1") for n in range(5) for line in lines
        ]
        path.write_text("\n".join([first, *copies, ""]), encoding="utf-8")
    assert sum(path.read_bytes().count(b"\n") for path in paths) > 20_000
    begun = time.process_time()
    assert call(monkeypatch, *map(str, paths)) == 0
    assert time.process_time() - begun < 10
    assert "5 requests" in capsys.readouterr().out
