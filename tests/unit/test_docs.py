"""The Markdown pages: what they link to and name is there, and every figure is that of its result file."""

import ast
import json
import re
from pathlib import Path

import make_docs
import pytest
from pages.blocks import blocks, without_blocks

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
NAMED = re.compile(r"`([\w./-]+\.(?:html|md|py|toml))`")
MODULE = re.compile(r"python -m (vllm_wanspec[\w.]*)")
MAKE = re.compile(r"`make ([a-z-]+)`")
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
FILES = [
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*"),
        *(
            file
            for room in ("docs", "examples", "scripts", "tests", "vllm_wanspec")
            for file in (ROOT / room).rglob("*")
        ),
    ]
]
#: Those that speak of the code as it is, not of a release or run of its own.
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "results"]
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
SOURCE = re.compile(r"\[[\w./]+\]\(([^)\s]*results/[\w/]+\.json)\), commit ([0-9a-f]{7,40}(?:-dirty)?)")
#: What stands in the place of figures whose file is missing.
NOT_YET = re.compile(r"This has not been measured yet: `make ([a-z-]+)` writes `(docs/results/[\w/]+\.json)`\.")
#: A number that says how long, how much or how many times, as measured things are told of.
FIGURE = re.compile(
    r"\d\s?(?:ms|µs|%|per cent|tokens/s|tokens per second|[kM]?B per|bytes per)(?!\w)|[×÷]\s?\d+\.\d|\d\.\d+ ?×"
    r"|\d\.\d+ of |\(\d\.\d+[–-]\d\.\d+\)|factor of \d"
)
#: What is chosen, not measured: round trips that are asked for, and an example of a pace.
CHOSEN = re.compile(r"R = [\d, .]+ ms|35 ms \+ 0\.1 ms per token")
#: The one section without kept data, which says so.
LOG = "\n## Log of trials\n"


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives the page's headings."""
    headings = HEADING.findall(page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text("utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_commands_that_are_named_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in NAMED.findall(text):
        assert any(f"/{file}".endswith(f"/{name}") for file in FILES), name
    for module in MODULE.findall(text):
        assert f"{module.rstrip('.').replace('.', '/')}.py" in FILES, module
    assert set(MAKE.findall(text)) <= set(TARGET.findall((ROOT / "Makefile").read_text("utf-8")))


def test_the_pages_at_the_top_are_looked_at() -> None:
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"} <= {page.name for page in PAGES}


# Figures


def claims(text: str) -> list[str]:
    """Figures that somebody has typed: outside blocks, and outside the log of trials."""
    return [found[0] for found in FIGURE.finditer(CHOSEN.sub("", without_blocks(text).split(LOG)[0]))]


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_as_make_docs_writes_them(page: Path) -> None:
    text = make_docs.generated(ROOT).get(page)
    assert text in (None, page.read_text("utf-8")), "run `make docs`"


@pytest.mark.parametrize("page", make_docs.pages(ROOT), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_names_its_file_and_that_file_s_commit(page: Path) -> None:
    for name, said in blocks(page.read_text("utf-8")).items():
        if missing := NOT_YET.fullmatch(said):
            assert missing[1] in TARGET.findall((ROOT / "Makefile").read_text("utf-8"))
            assert not (ROOT / missing[2]).exists(), name
            continue
        sources = SOURCE.findall(said)
        assert sources, f"{name}: no file and commit"
        for path, commit in sources:
            assert commit == json.loads((page.parent / path).read_text("utf-8"))["commit"], name


@pytest.mark.parametrize(
    "page", [page for page in PRESENT if "examples" not in page.parts], ids=lambda page: str(page.relative_to(ROOT))
)
def test_nobody_types_a_figure(page: Path) -> None:
    assert not claims(page.read_text("utf-8")), (
        "a measured figure belongs into a block (scripts/pages/), with its source"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A step takes 4.4 ms.", ["4 ms"]),
        ("It costs 9 % of a step.", ["9 %"]),
        ("That is 0.81 of plain decoding.", ["0.81 of "]),
        ("The ratio was × 0.881 (0.811–0.947).", ["× 0.8", "(0.811–0.947)"]),
        ("194 tokens per second", ["4 tokens per second"]),
        ("trees cost 1,496 bytes per token", ["6 bytes per"]),
        ("On the demo pair R = 0, 30 ms; tried again within 5 s; 8 MiB a frame; vLLM 0.32.0.", []),
        ("<!-- figures: a -->4.4 ms<!-- end --> and so on", []),
        ("Held.\n\n## Log of trials\n\n0.74 ms", []),
    ],
)
def test_what_a_typed_figure_is(text: str, found: list[str]) -> None:
    assert claims(text) == found


def test_the_log_of_trials_says_that_nothing_of_it_can_be_checked() -> None:
    pages = [page for page in PRESENT if LOG in page.read_text("utf-8")]
    assert [page.name for page in pages] == ["performance.md"]
    assert "raw data were not kept" in pages[0].read_text("utf-8").split(LOG)[1].split("\n###")[0]


def test_readme_is_short_and_says_what_leaves_the_site() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 130
    assert "no memory and no draft pass on the target's GPUs" in " ".join(text.split("\n\n")[1].split())
    for page in (text, (ROOT / "SECURITY.md").read_text("utf-8")):
        assert re.search(r"every prompt and every generated token.*?goes to the drafter's host", page, re.I | re.S)


# Log lines


def said(call: ast.Call) -> str:
    """The first fixed piece of what a call logs or raises that is longer than a word."""
    first = call.args[0] if call.args else None
    parts = first.values if isinstance(first, ast.JoinedStr) else [first]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    pieces = [piece.strip(" ,:;%") for text in texts for piece in re.split(r"%\.?\d*[sdf]|[;:()]", text)]
    return next((piece for piece in pieces if len(piece) >= 10), "")


def log_lines() -> set[str]:
    """What operators may read of serving processes: troubles of a link, and what is logged as worse than news."""
    found, package = set(), ROOT / "vllm_wanspec"
    rooms = [*(package / "controller").rglob("*.py"), *(package / "drafter").rglob("*.py"), package / "eventlog.py"]
    for file in rooms:
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(call, ast.Call):
                name = ast.unparse(call.func)
                if name in {"Trouble", "logger.warning", "logger.error", "logger.exception"}:
                    found.add(said(call))
    return found - {""}


def test_the_operator_s_page_knows_every_log_line() -> None:
    text = " ".join((ROOT / "docs/operate.md").read_text("utf-8").split())
    assert len(log_lines()) > 25
    assert not {line for line in log_lines() if line not in text}
