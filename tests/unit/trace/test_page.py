"""The page's data, the tree's layout, and that the page needs nothing but itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sample import CONTROLLER_S, at_controller, call, header, write, write_made_up, write_pair

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.trace.layout import UNDRAFTED, lay_out
from vllm_wanspec.trace.page import page_data, render, token_texts, tokens_of, write_page
from vllm_wanspec.trace.timeline import Timeline, find_request, load, summarize


def load_one(*paths: Path) -> Timeline:
    [timeline] = load(paths, [find_request(summarize(paths), None)])
    return timeline


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    return load_one(*write_pair(tmp_path))


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_needs_nothing_else(tmp_path: Path, timeline: Timeline) -> None:
    write_page(tmp_path / "page.html", timeline)
    page = (tmp_path / "page.html").read_text("utf-8")
    for mark in (
        "http:",
        "https:",
        "//cdn",
        "@import",
        "url(",
        "src=",
        "href=",
        "fetch(",
        "/*DATA*/",
        "/*CODE*/",
        "/*STYLE*/",
    ):
        assert mark not in page
    assert "default-src 'none'" in page


def test_the_data(timeline: Timeline) -> None:
    data = embedded(render(page_data(timeline, {10: "ten"})))
    assert data["figures"]["id"] == "req-a"
    assert data["texts"] == {"10": "ten"}
    assert data["delays"] == {"up": 10.0, "down": 10.0}
    assert data["passes"] == 11
    step = data["steps"][1]
    assert (step["start"], step["end"], step["had"], step["outcome"], step["received"]) == (
        41,
        80,
        "full",
        "caught",
        90,
    )
    tree = data["tree"]
    assert {len(column) for column in tree.values()} == {19}
    assert [tree["id"][node] for node in step["draft"]] == [2, 4]
    assert [data["names"][fate] for fate in tree["fate"][:11]] == [
        "foreseen", "caught", "accepted", "accepted", "echo", "late", "accepted", *[UNDRAFTED] * 4,
    ]  # fmt: skip


def test_the_layout_of_the_sample(timeline: Timeline) -> None:
    places = lay_out(timeline.target)
    at = {place.node.id: (place.column, place.row) for place in places if place.node is not None}
    assert {node: at[node] for node in (1, 3, 5, 7, 12, 13, 15)} == {
        1: (1, 0), 3: (2, 0), 5: (3, 0), 7: (4, 0), 12: (5, 0), 13: (6, 0), 15: (7, 0),
    }  # fmt: skip
    # The rejected draft with its end comes first, in one row.
    assert (at[2], at[4], at[6]) == ((2, 1), (3, 1), (4, 1))
    assert at[8][1] == at[10][1] == at[11][1]


@pytest.mark.parametrize("branches", [1, 8])
def test_no_two_nodes_are_at_one_place(tmp_path: Path, branches: int) -> None:
    timeline = load_one(*write_made_up(tmp_path, tokens=80, branches=branches))
    places = lay_out(timeline.target)
    assert len({(place.column, place.row) for place in places}) == len(places)
    nodes = {id(place.node) for place in places if place.node is not None}
    assert nodes == {id(node) for node in timeline.target.nodes}
    for index, place in enumerate(places):
        assert -1 <= place.above < index
        above = places[place.above] if place.above >= 0 else None
        assert (above.column if above else 0) == place.column - 1
        assert (above.row if above else 0) <= place.row


def test_texts_from_outside_stay_texts(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- \ud800 \u2028"
    lines = at_controller(evil)
    lines[1]["drafter"] = evil
    page = render(
        page_data(load_one(write(tmp_path / "log", [header("controller", CONTROLLER_S), *lines])), {10: evil})
    )
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    data = embedded(page)
    assert data["figures"]["id"] == data["texts"]["10"] == evil
    page.encode("utf-8")


def test_a_request_that_has_only_begun(tmp_path: Path) -> None:
    path = write(tmp_path / "log", [header("controller", CONTROLLER_S), call(0, "r", "begin", context=[1])])
    data = embedded(render(page_data(load_one(path), {})))
    assert (data["steps"], data["tree"]["row"], data["figures"]["ms_per_token"]) == ([], [], None)


def test_token_texts(tmp_path: Path, timeline: Timeline) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"a b": 10, "x\ny": 12, "?": 0}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    assert {10, 12, 14, 46} <= tokens_of(timeline)
    assert token_texts(tmp_path, tokens_of(timeline) | {2**40}) == {10: "a␣b", 12: "x⏎y"}


def test_no_tokenizer_there(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match="--tokenizer: there is no "):
        token_texts(tmp_path, [1])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer: "):
        token_texts(tmp_path, [1])
