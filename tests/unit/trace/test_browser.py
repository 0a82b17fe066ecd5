"""The page in a real browser: it draws everything, reports no error, and answers to pointing and keys."""

import contextlib
import os
import re
import shutil
import signal
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from sample import CONTROLLER_S, at_controller, call, header, write, write_made_up, write_pair

from vllm_wanspec.trace.page import write_page
from vllm_wanspec.trace.timeline import find_request, load, summarize

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTH, HEIGHT = 1300, 900
LIMIT_S = 100

Browse = Callable[..., str]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Run the browser on a page; what it prints."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        message = f"none of {', '.join(NAMES)} is installed"
        if os.environ.get("CI"):
            pytest.fail(f"CI is set, but {message}")
        pytest.skip(message)

    def run(page: Path, *flags: str) -> str:
        profile = tmp_path / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, start_new_session=True, **pipes) as process:
            try:
                out, err = process.communicate(timeout=LIMIT_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its helpers too
        assert process.returncode == 0, err
        return out

    return run


def make_page(folder: Path, *logs: Path, texts: dict[int, str] | None = None) -> Path:
    [timeline] = load(logs, [find_request(summarize(logs), None)])
    page = folder / "page.html"
    write_page(page, timeline, texts)
    return page


def drawn(dom: str) -> tuple[int, int]:
    """Bars of steps and nodes of the tree that the page has drawn."""
    assert "data-error" not in dom
    apart = len(re.findall(r'<circle [^>]*class="node ', dom))
    dots = re.findall(r'<path [^>]*class="dots"[^>]* d="([^"]*)"', dom)
    return len(re.findall(r'<rect [^>]*class="step ', dom)), apart + sum(path.count("M") for path in dots)


def test_everything_is_drawn(tmp_path: Path, browse: Browse) -> None:
    dom = browse(make_page(tmp_path, *write_pair(tmp_path)), "--dump-dom")
    assert 'data-ready="8 steps, 19 nodes"' in dom
    assert drawn(dom) == (8, 19)
    assert len(re.findall('class="branch-run (?:main|side)"', dom)) == 3
    assert len(re.findall('class="branch-run promoted"', dom)) == 1
    assert len(re.findall('class="receipt"', dom)) == 5
    assert len(re.findall('class="wait"', dom)) == 1
    assert len(re.findall('class="link"', dom)) == 2
    assert [dom.count(f'class="outcome {name}"') for name in ("caught", "miss", "beyond")] == [1, 1, 2]
    assert "14 nodes drafted, 5 used, 8 wasted, 1 right but late; besides, both sides made 1 echo of committed" in dom


@pytest.mark.parametrize("logs", [1, 2])
def test_a_longer_request(tmp_path: Path, browse: Browse, logs: int) -> None:
    page = make_page(tmp_path, *write_made_up(tmp_path, tokens=60)[:logs])
    dom = browse(page, "--dump-dom")
    found = re.search(r'data-ready="(\d+) steps, (\d+) nodes"', dom)
    assert found
    assert drawn(dom) == (int(found[1]), int(found[2]))
    assert ('class="branch-run' in dom) is (logs == 2)


def test_hostile_texts(tmp_path: Path, browse: Browse) -> None:
    evil = "</script><img src=x onerror='document.body.dataset.error=1'>"
    lines = at_controller(evil)
    lines[1]["drafter"] = evil
    log = write(tmp_path / "log", [header("controller", CONTROLLER_S), *lines])
    dom = browse(make_page(tmp_path, log, texts={10: evil, 12: evil}), "--dump-dom")
    assert drawn(dom) == (8, 19)
    assert "<img" not in dom


def test_a_request_that_has_only_begun(tmp_path: Path, browse: Browse) -> None:
    log = write(tmp_path / "log", [header("controller", CONTROLLER_S), call(0, "r", "begin", context=[1])])
    dom = browse(make_page(tmp_path, log), "--dump-dom")
    assert drawn(dom) == (0, 0)
    assert 'data-ready="0 steps, 0 nodes"' in dom


POINT = """
<script>
const seen = [], tip = document.getElementById("tip");
const note = (what) => seen.push(what + ": " + (tip.hidden ? "nothing" : tip.textContent));
const key = (name) => document.dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
const move = (element, clientX, clientY) =>
  element.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, clientX, clientY }));
key("ArrowRight"); key("ArrowRight"); note("keys");
seen.push("rings: " + document.querySelectorAll(".ring").length);
key("Escape"); note("escape");
move(document.querySelectorAll(".reach")[2], 5, 5); note("step");
const node = document.querySelectorAll(".node")[1].getBoundingClientRect();
move(document.getElementById("tree"), node.x + node.width / 2, node.y + node.height / 2); note("node");
const echo = document.querySelector(".node.echo").getBoundingClientRect();
move(document.getElementById("tree"), echo.x + echo.width / 2, echo.y + echo.height / 2); note("echo");
move(document.querySelector(".branch-run"), 5, 5); note("branch");
const dots = () => document.querySelectorAll(".dots").length, before = dots();
for (const entry of document.querySelectorAll("#tree-legend .switch")) entry.click();
seen.push("dots: " + before + " then " + dots());
for (const id of ["time-zoom", "tree-zoom"]) {
  const zoom = document.getElementById(id);
  zoom.value = 1;
  zoom.dispatchEvent(new Event("input"));
}
seen.push("bars: " + document.querySelectorAll(".step").length);
document.body.dataset.seen = seen.join(" | ");
</script>
"""


def test_pointing_and_keys(tmp_path: Path, browse: Browse) -> None:
    page = make_page(tmp_path, *write_pair(tmp_path))
    page.write_text(page.read_text("utf-8").replace("</body>", POINT + "</body>"), encoding="utf-8")
    dom = browse(page, "--dump-dom", f"--window-size={WIDTH},{HEIGHT}")
    assert "data-error" not in dom
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found
    keys, rings, escape, step, node, echo, branch, dots, bars = found[1].split(" | ")
    assert keys.startswith("keys: step 1")
    assert "drafts: 11  13" in keys
    assert rings == "rings: 2"
    assert escape == "escape: nothing"
    assert step.startswith("step: step 2")
    assert node.startswith("node: 12")
    assert "branch that was hit" in node
    assert "probability 0.301" in node
    assert echo.startswith("echo: 30position 7, echo of a commit")
    assert "node 12, made by both sides, here at 165.0 ms" in echo
    assert branch.startswith("branch: main line (1)")
    assert dots == "dots: 3 then 0"
    assert bars == "bars: 8"


@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0",)], ids=["light", "dark"])
def test_it_looks_like_something(tmp_path: Path, browse: Browse, flags: tuple[str, ...]) -> None:
    picture = tmp_path / "picture.png"
    page = make_page(tmp_path, *write_made_up(tmp_path, tokens=40))
    browse(page, f"--screenshot={picture}", f"--window-size={WIDTH},{HEIGHT}", *flags)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (WIDTH, HEIGHT)
    assert len(content) > 30_000
    assert len(set(pixels(content))) > 50


def pixels(png: bytes) -> bytes:
    """The picture's filtered rows: of a blank picture they are nearly all the same."""
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    return zlib.decompress(data)
