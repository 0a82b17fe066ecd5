"""The configuration file: what is right, and what is said when it is wrong."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_wanspec.config import (
    CONFIG_ENV,
    TOKEN_ENV,
    DraftEndpoint,
    Settings,
    TreeSettings,
    load_settings,
    settings_path,
)
from vllm_wanspec.errors import ConfigError

ENDPOINTS = 'draft_endpoints:\n  - {name: eu, url: "http://127.0.0.1:8101"}\n'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (CONFIG_ENV, TOKEN_ENV, "NO_SUCH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "wanspec.yaml"


def load(file: Path, text: str) -> Settings:
    file.write_text(text, encoding="utf-8")
    return load_settings(file)


def test_the_least_that_works(file: Path) -> None:
    settings = load(file, ENDPOINTS)
    assert [(e.name, e.url) for e in settings.draft_endpoints] == [("eu", "http://127.0.0.1:8101")]
    assert settings.tree.lookahead_tokens == "auto"
    assert settings.late.policy == "adaptive"
    assert settings.fallback == ("ngram",)
    assert settings.metrics is None
    assert settings.events is None


def test_everything_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EU_TOKEN", "secret")
    settings = load(
        file,
        """
draft_endpoints:
  - {name: eu, url: "https://draft.example.com:8443/base/", token_env: EU_TOKEN}
  - {name: us, url: "http://10.0.0.1", insecure: true}
tree:
  max_branches: 1
  max_nodes: 64
  lookahead_tokens: 12
  entropy_threshold_nats: 1
  running_branches: 3
  branch_depth: 5
  min_probability: 0.5
length: {max: 5, policy: awc}
late: {policy: fixed, max_wait_ms: 2.5}
metrics: {port: 9464}
events: events.jsonl
""",
    )
    assert settings.draft_endpoints[0].url == "https://draft.example.com:8443/base"
    assert settings.draft_endpoints[0].token() == "secret"
    assert settings.tree.lookahead_tokens == 12
    assert (settings.tree.entropy_threshold_nats, settings.tree.running_branches) == (1.0, 3)
    assert (settings.tree.branch_depth, settings.tree.min_probability) == (5, 0.5)
    assert (settings.length.max, settings.length.policy, settings.late.max_wait_ms) == (5, "awc", 2.5)
    assert settings.events == "events.jsonl"
    assert settings.metrics is not None
    assert (settings.metrics.host, settings.metrics.port) == ("127.0.0.1", 9464)


def test_the_token_comes_from_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = load(file, ENDPOINTS).draft_endpoints[0]
    assert endpoint.token() is None
    monkeypatch.setenv(TOKEN_ENV, "general")
    assert endpoint.token() == "general"


WRONG = {
    "unknown key": (
        ENDPOINTS + "tre: {}\n",
        ["tre:", "is not a known key", "draft_endpoints", "tree", "length", "late"],
    ),
    "unknown key of an endpoint": (
        "draft_endpoints:\n  - {name: a, url: 'http://h', tokn: X}\n",
        ["draft_endpoints.0.tokn", "is not a known key", "name", "url", "token_env"],
    ),
    "unknown key of a section": (
        ENDPOINTS + "tree: {max_branch: 3}\n",
        ["tree.max_branch", "is not a known key", "max_branches", "max_nodes"],
    ),
    "unknown key of metrics": (ENDPOINTS + "metrics: {port: 1, hots: x}\n", ["metrics.hots", "host"]),
    "no endpoints": ("tree: {}\n", ["draft_endpoints: is missing"]),
    "empty endpoints": ("draft_endpoints: []\n", ["draft_endpoints: []", "at least 1 item"]),
    "endpoints is no list": ("draft_endpoints: 7\n", ["draft_endpoints: 7", "tuple"]),
    "endpoint is no mapping": ("draft_endpoints: [x]\n", ["draft_endpoints.0: 'x'", "must be a mapping"]),
    "no url": ("draft_endpoints: [{name: a}]\n", ["draft_endpoints.0.url: is missing"]),
    "no name": ("draft_endpoints: [{url: 'http://h'}]\n", ["draft_endpoints.0.name: is missing"]),
    "empty name": ("draft_endpoints: [{name: '', url: 'http://h'}]\n", ["draft_endpoints.0.name: ''", "at least 1"]),
    "url without scheme": (
        "draft_endpoints: [{name: a, url: 'draft.example.com:8443'}]\n",
        ["draft_endpoints.0.url: 'draft.example.com:8443'", "must be a base URL such as https://"],
    ),
    "url of a WebSocket": ("draft_endpoints: [{name: a, url: 'ws://h'}]\n", ["url: 'ws://h'", "must be a base URL"]),
    "url with port out of range": ("draft_endpoints: [{name: a, url: 'http://h:99999'}]\n", ["must be a base URL"]),
    "url with port 0": ("draft_endpoints: [{name: a, url: 'http://h:0'}]\n", ["must be a base URL"]),
    "url with a broken address": ("draft_endpoints: [{name: a, url: 'http://[::1'}]\n", ["must be a base URL"]),
    "url is a number": ("draft_endpoints: [{name: a, url: 5}]\n", ["draft_endpoints.0.url: 5", "string"]),
    "branches too many": (
        ENDPOINTS + "tree: {max_branches: 65}\n",
        ["tree.max_branches: 65", "less than or equal to 64"],
    ),
    "branches too few": (
        ENDPOINTS + "tree: {max_branches: 0}\n",
        ["tree.max_branches: 0", "greater than or equal to 1"],
    ),
    "nodes is a word": (ENDPOINTS + "tree: {max_nodes: many}\n", ["tree.max_nodes: 'many'", "integer"]),
    "lookahead is a word": (ENDPOINTS + "tree: {lookahead_tokens: far}\n", ["tree.lookahead_tokens: 'far'", "'auto'"]),
    "a negative threshold": (
        ENDPOINTS + "tree: {entropy_threshold_nats: -0.5}\n",
        ["tree.entropy_threshold_nats: -0.5", "must be adaptive, .inf (never branch) or 0 to 100 nats"],
    ),
    "threshold is a word": (
        ENDPOINTS + "tree: {entropy_threshold_nats: some}\n",
        ["tree.entropy_threshold_nats: 'some'", "'adaptive'"],
    ),
    "a threshold that is far too high": (
        ENDPOINTS + "tree: {entropy_threshold_nats: 101}\n",
        ["tree.entropy_threshold_nats: 101", "0 to 100 nats"],
    ),
    "threshold is not a number": (ENDPOINTS + "tree: {entropy_threshold_nats: .nan}\n", ["threshold_nats: nan"]),
    "running branches too many": (
        ENDPOINTS + "tree: {running_branches: 1025}\n",
        ["running_branches: 1025", "1024"],
    ),
    "no depth": (ENDPOINTS + "tree: {branch_depth: 0}\n", ["tree.branch_depth: 0", "greater than or equal to 1"]),
    "a probability over 1": (
        ENDPOINTS + "tree: {min_probability: 1.5}\n",
        ["tree.min_probability: 1.5", "less than or equal to 1"],
    ),
    "unknown length policy": (
        ENDPOINTS + "length: {policy: best}\n",
        ["length.policy: 'best'", "'fixed', 'marginal' or 'awc'"],
    ),
    "events is no path": (ENDPOINTS + "events: 7\n", ["events: 7", "string"]),
    "events is empty": (ENDPOINTS + "events: ''\n", ["events: ''", "at least 1 character"]),
    "lookahead too long": (ENDPOINTS + "tree: {lookahead_tokens: 5000}\n", ["tree.lookahead_tokens: 5000", "4096"]),
    "section is a list": (ENDPOINTS + "tree: [1]\n", ["tree: [1]: must be a mapping"]),
    "section is empty": (ENDPOINTS + "tree:\n", ["tree: is empty; give it a key or leave it out"]),
    "length too long": (ENDPOINTS + "length: {max: 65}\n", ["length.max: 65", "less than or equal to 64"]),
    "unknown policy": (
        ENDPOINTS + "late: {policy: always}\n",
        ["policy: 'always'", "'none', 'adaptive' or 'fixed'"],
    ),
    "wait is negative": (
        ENDPOINTS + "late: {max_wait_ms: -1}\n",
        ["late.max_wait_ms: -1", "greater than or equal to 0"],
    ),
    "wait is not finite": (ENDPOINTS + "late: {max_wait_ms: .nan}\n", ["late.max_wait_ms: nan"]),
    "port too high": (ENDPOINTS + "metrics: {port: 70000}\n", ["metrics.port: 70000", "65535"]),
    "metrics without port": (ENDPOINTS + "metrics: {}\n", ["metrics.port: is missing"]),
    "empty file": ("", ["must be a mapping with the key draft_endpoints", "NoneType"]),
    "only a comment": ("# nothing\n", ["must be a mapping"]),
    "a list": ("- 1\n", ["must be a mapping", "list"]),
    "a word": ("hello\n", ["must be a mapping", "str"]),
    "not YAML": ("a: [1\nb: 2\n", ["is not valid YAML", "line 2"]),
    "a tab": ("a:\n\t- b\n", ["is not valid YAML", "line 2"]),
    "a control character": ("a: \x00\n", ["is not valid YAML"]),
    "two documents": (ENDPOINTS + "---\n" + ENDPOINTS, ["is not valid YAML"]),
    "a Python object": ("a: !!python/object:os.system {}\n", ["is not valid YAML"]),
    "duplicate names": (
        "draft_endpoints: [{name: a, url: 'http://h'}, {name: a, url: 'http://g'}]\n",
        ["draft_endpoints: the name 'a' is given twice", "must differ"],
    ),
    "unset token": (
        "draft_endpoints: [{name: a, url: 'http://h', token_env: NO_SUCH_TOKEN}]\n",
        ["draft_endpoints: a: token_env: the environment variable NO_SUCH_TOKEN is not set", "set it to"],
    ),
    "several at once": (
        "draft_endpoints: [{name: a}]\nlength: {max: 0}\n",
        ["draft_endpoints.0.url: is missing", "length.max: 0"],
    ),
}


@pytest.mark.parametrize(("text", "fragments"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_line(file: Path, text: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, text)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert "pydantic" not in message


def test_no_such_file(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"wanspec\.yaml: cannot be read: No such file"):
        load_settings(file)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)


def test_bytes_that_are_no_text(file: Path) -> None:
    file.write_bytes(b"draft_endpoints: \xff\xfe\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_settings(file)


def test_a_token_is_never_in_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EU_TOKEN", "very-secret")
    with pytest.raises(ConfigError) as caught:
        load(file, "draft_endpoints: [{name: a, url: 'x', token_env: EU_TOKEN}]\n")
    assert "very-secret" not in str(caught.value)


def test_settings_are_frozen(file: Path) -> None:
    settings = load(file, ENDPOINTS)
    with pytest.raises(ValidationError, match="frozen"):
        settings.tree = settings.tree  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.draft_endpoints[0].name = "other"  # type: ignore[misc]


def test_path_from_the_flag_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, "from-env.yaml")
    assert settings_path({"wanspec": "flag.yaml"}) == "flag.yaml"
    assert settings_path({}) == settings_path(None) == settings_path({"other": 1}) == "from-env.yaml"


@pytest.mark.parametrize("given", [None, {}, {"wanspec": {"tree": {}}}, {"wanspec": 7}, {"wanspec": ""}])
def test_no_path(given: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    with pytest.raises(ConfigError, match=f"--additional-config.*{CONFIG_ENV}") as caught:
        settings_path(given)
    assert "\n" not in str(caught.value)


def test_an_endpoint_strips_the_last_slash() -> None:
    assert DraftEndpoint(name="a", url="https://h/x/").url == "https://h/x"


# What one request asks for


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("max_branches=1", {"max_branches": 1}),
        (
            " max_branches = 2 ,entropy_threshold_nats=0.25",
            {"max_branches": 2, "entropy_threshold_nats": 0.25},
        ),
        (
            "entropy_threshold_nats=adaptive,lookahead_tokens=auto",
            {"entropy_threshold_nats": "adaptive", "lookahead_tokens": "auto"},
        ),
        (
            "lookahead_tokens=9,min_probability=0,branch_depth=3",
            {"lookahead_tokens": 9, "min_probability": 0.0, "branch_depth": 3},
        ),
        ("entropy_threshold_nats=inf", {"entropy_threshold_nats": float("inf")}),
    ],
)
def test_settings_with_some_replaced(text: str, changes: dict[str, object]) -> None:
    base = TreeSettings(max_nodes=99, lookahead_tokens=20, entropy_threshold_nats=1.5)
    replaced = base.overridden(text)
    assert replaced.model_dump() == {**base.model_dump(), **changes}
    assert base.max_nodes == 99


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["''", 'expected "off" or key=value']),
        ("narrow", ["'narrow'", "as in max_branches=1"]),
        ("max_branches=1,", ["''", "key=value"]),
        ("max_branches=0", ["max_branches: '0'", "greater than or equal to 1"]),
        ("max_branches=65", ["max_branches: '65'", "less than or equal to 64"]),
        ("max_branches=", ["max_branches: ''", "integer"]),
        ("max_branches=1.5", ["max_branches: '1.5'", "integer"]),
        ("min_probability=2", ["min_probability: '2'", "less than or equal to 1"]),
        ("entropy_threshold_nats=-1", ["entropy_threshold_nats: '-1'", "or 0 to 100 nats"]),
        ("lookahead_tokens=far", ["lookahead_tokens: 'far'", "'auto'"]),
        ("max_branch=1", ["max_branch: is not a known key", "max_branches", "lookahead_tokens"]),
        ("max_branches=0,max_nodes=1", ["max_branches: '0'", "; max_nodes: '1'"]),
        ("x" * 500, ["x" * 70]),
    ],
)
def test_what_is_wrong_with_a_request_s_settings(text: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TreeSettings().overridden(text)
    message = str(caught.value)
    assert message.startswith("wanspec: ")
    assert len(message) < 400
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert "pydantic" not in message
