"""Odd input in the configuration file: what YAML would silently turn into something else, or choke on."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_wanspec.config import CONFIG_ENV, TOKEN_ENV, Settings, TreeSettings, load_settings, settings_path
from vllm_wanspec.errors import ConfigError

ENDPOINTS = 'draft_endpoints:\n  - {name: eu, url: "http://127.0.0.1:8101"}\n'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (CONFIG_ENV, TOKEN_ENV):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "wanspec.yaml"


def load(file: Path, text: str) -> Settings:
    file.write_text(text, encoding="utf-8")
    return load_settings(file)


def refused(file: Path, text: str) -> str:
    """The one line that is said of a file."""
    with pytest.raises(ConfigError) as caught:
        load(file, text)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert message.isprintable()
    assert len(message) < 500 + len(str(file))
    return message.removeprefix(f"{file}: ")


# A key given twice


TWICE = {
    "the endpoints": (ENDPOINTS + "late: {max_wait_ms: 1}\n" + ENDPOINTS, "draft_endpoints", 4, 1),
    "a section": (ENDPOINTS + "tree: {max_nodes: 64}\n\ntree:\n  max_branches: 2\n", "tree", 5, 3),
    "in a section": (ENDPOINTS + "tree:\n  max_nodes: 64\n  # why\n  max_nodes: 128\n", "max_nodes", 6, 4),
    "in an endpoint": (
        "draft_endpoints:\n  - name: eu\n    url: http://h\n    name: us\n",
        "name",
        4,
        2,
    ),
    "on one line": ("draft_endpoints: [{name: a, url: 'http://h', url: 'http://g'}]\n", "url", 1, 1),
    "quoted another way": (ENDPOINTS + "late: {policy: none}\n'late': {policy: fixed}\n", "late", 4, 3),
    "beside a merge": (
        ENDPOINTS + "x-t: &t {max_nodes: 64}\ntree:\n  <<: *t\n  max_nodes: 8\n  max_nodes: 9\n",
        "max_nodes",
        7,
        6,
    ),
    "in what is the user's own": (ENDPOINTS + "x-t:\n  a: 1\n  a: 2\n", "a", 5, 4),
    "what is the user's own": (ENDPOINTS + "x-t: 1\nx-t: 2\n", "x-t", 4, 3),
}


@pytest.mark.parametrize(("text", "key", "line", "first"), TWICE.values(), ids=TWICE.keys())
def test_a_key_given_twice(file: Path, text: str, key: str, line: int, first: int) -> None:
    message = refused(file, text)
    assert message == f"line {line}: the key {key} is given twice (first at line {first}); keep one of them"


# What YAML makes of values


NUMBERS = {
    "octal": ("metrics: {port: 010000}", ["line 3", "010000", "octal", "4096", "decimal"]),
    "not even octal": ("metrics: {port: 09464}", ["line 3", "09464", "decimal"]),
    "octal as Python writes it": ("metrics: {port: 0o17}", ["line 3", "0o17", "decimal"]),
    "hexadecimal": ("metrics: {port: 0x2500}", ["line 3", "0x2500", "decimal"]),
    "binary": ("metrics: {port: 0b1001}", ["line 3", "0b1001", "decimal"]),
    "underscores": ("metrics: {port: 1_000}", ["line 3", "1_000", "decimal"]),
    "sexagesimal": ("late: {max_wait_ms: 1:30}", ["line 3", "1:30", "decimal"]),
    "sexagesimal with a fraction": ("late: {max_wait_ms: 1:30.5}", ["line 3", "1:30.5", "decimal"]),
    "a signed octal": ("tree: {max_nodes: -010}", ["line 3", "-010", "decimal"]),
    "a plus sign alone is none": ("tree: {max_nodes: +0_1}", ["line 3", "+0_1", "decimal"]),
    "huge": (f"tree: {{max_nodes: {'9' * 5000}}}", ["line 3", "999", "digits"]),
    "a huge fraction": (f"late: {{max_wait_ms: {'9' * 5000}.0}}", ["line 3", "999", "digits"]),
    "said to be a number": ("tree: {max_nodes: !!int many}", ["line 3", "many"]),
    "said to be a fraction": ("late: {max_wait_ms: !!float many}", ["line 3", "many"]),
    "said to be true or false": ("length: {shut_off: !!bool maybe}", ["line 3", "maybe"]),
    "a date that is none": ("events: 2026-13-45", ["line 3", "2026-13-45", "date", "quotes"]),
    "a date": ("events: 2026-11-27", ["line 3", "2026-11-27", "date", "quotes"]),
    "a time": ("events: 2026-11-27 10:00:00", ["line 3", "2026-11-27 10:00:00", "date", "quotes"]),
    "said to be a date": ("events: !!timestamp x", ["line 3", "timestamp"]),
    "said to be bytes": ("events: !!binary x", ["line 3", "binary"]),
    "a set": ("fallback: !!set {ngram}", ["line 3", "set"]),
    "a key that is true": ("tree: {yes: 1}", ["line 3", "yes", "quotes"]),
    "a key that is a number": ("8: 1", ["line 3", "8", "quotes"]),
    "a key that is nothing": ("tree: {~: 1}", ["line 3", "key ~", "quotes"]),
    "a key that is a list": ("tree: {[a]: 1}", ["line 3", "key", "text"]),
}


@pytest.mark.parametrize(("line", "fragments"), NUMBERS.values(), ids=NUMBERS.keys())
def test_what_yaml_would_make_something_else_of(file: Path, line: str, fragments: list[str]) -> None:
    message = refused(file, ENDPOINTS + line + "\n")
    for fragment in fragments:
        assert fragment in message


TYPES = {
    "true for a number": ("tree: {max_branches: true}", ["tree.max_branches: True", "integer"]),
    "off for a number": ("tree: {max_branches: off}", ["tree.max_branches: False", "off", "integer"]),
    "true for a fraction": ("late: {max_wait_ms: true}", ["late.max_wait_ms: True", "number"]),
    "true for a number or a word": ("tree: {lookahead_tokens: true}", ["tree.lookahead_tokens: True", "integer"]),
    "true for a threshold": ("tree: {entropy_threshold_nats: true}", ["tree.entropy_threshold_nats: True"]),
    "a fraction for a number": ("tree: {max_nodes: 64.0}", ["tree.max_nodes: 64.0", "integer"]),
    "text for a number": ("tree: {max_nodes: '64'}", ["tree.max_nodes: '64'", "integer"]),
    "text for a fraction": ("late: {max_wait_ms: '1'}", ["late.max_wait_ms: '1'", "number"]),
    "text for a threshold": ("tree: {entropy_threshold_nats: '1'}", ["tree.entropy_threshold_nats: '1'"]),
    "text for true": ("length: {shut_off: 'yes'}", ["length.shut_off: 'yes'", "boolean"]),
    "a number for true": ("length: {shut_off: 1}", ["length.shut_off: 1", "boolean"]),
    "a line end in a path": ('events: "a\\nb"', ["events: 'a\\nb'", "control characters"]),
    "a null in a path": ('events: "a\\0b"', ["events", "control characters"]),
    "a line end in a host": ('metrics: {port: 1, host: "h\\n"}', ["metrics.host: 'h\\n'", "control characters"]),
    "true for a choice": ("length: {policy: on}", ["length.policy: True", "'fixed', 'marginal' or 'awc'", "quotes"]),
}


@pytest.mark.parametrize(("line", "fragments"), TYPES.values(), ids=TYPES.keys())
def test_values_of_another_type(file: Path, line: str, fragments: list[str]) -> None:
    message = refused(file, ENDPOINTS + line + "\n")
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("endpoint", "fragments"),
    [
        ("{name: 2026-13-45, url: 'http://h'}", ["line 1", "2026-13-45", "date", "quotes"]),
        ("{name: 0123, url: 'http://h'}", ["line 1", "0123", "quotes"]),
        ('{name: "a\\nb", url: "http://h"}', ["draft_endpoints.0.name: 'a\\nb'", "control characters"]),
        ('{name: "a\\u202eb", url: "http://h"}', ["draft_endpoints.0.name", "control characters"]),
        ('{name: " a", url: "http://h"}', ["draft_endpoints.0.name: ' a'", "blanks"]),
        ('{name: a, url: "http://h\\n:1"}', ["draft_endpoints.0.url", "base URL"]),
        ('{name: a, url: "http://h\\t:1"}', ["draft_endpoints.0.url", "base URL"]),
        ('{name: a, url: " http://h:1"}', ["draft_endpoints.0.url", "base URL"]),
        ('{name: a, url: "http://h x:1"}', ["draft_endpoints.0.url", "base URL"]),
        ('{name: a, url: "http://h", token_env: "A\\nB"}', ["draft_endpoints.0.token_env", "name of an environment"]),
    ],
)
def test_values_of_an_endpoint(file: Path, endpoint: str, fragments: list[str]) -> None:
    message = refused(file, f"draft_endpoints: [{endpoint}]\n")
    for fragment in fragments:
        assert fragment in message


SAME = [
    ("http://draft.example:80", "http://draft.example"),
    ("http://draft.example", "HTTP://DRAFT.example/"),
    ("https://draft.example:443/a/", "https://draft.example/a"),
    ("http://[::1]:8101", "http://[0:0::1]:8101"),
    ("http://127.0.0.1:8101", "http://127.0.0.1:8101"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_the_same_drafter_twice(file: Path, first: str, second: str) -> None:
    text = f"draft_endpoints: [{{name: eu, url: '{first}'}}, {{name: us, url: '{second}'}}]\n"
    message = refused(file, text)
    assert message == "draft_endpoints: eu and us have the same url; keep one of them"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("http://h:80", "https://h:80"),
        ("http://h/a", "http://h/b"),
        ("http://h:1", "http://h:2"),
        ("http://h/a", "http://h/A"),
    ],
)
def test_different_drafters(file: Path, first: str, second: str) -> None:
    more = "insecure: true"
    text = f"draft_endpoints: [{{name: eu, url: '{first}', {more}}}, {{name: us, url: '{second}', {more}}}]\n"
    settings = load(file, text)
    assert len(settings.draft_endpoints) == 2


NESTED = "[" * 1000 + "]" * 1000
BOMB = "".join(f"x-{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
SHAPES = {
    "nested lists": (ENDPOINTS + f"tree: {NESTED}\n", ["line 3", "nested"]),
    "nested mappings": (ENDPOINTS + f"tree: {'{a: ' * 1000}1{'}' * 1000}\n", ["line 3", "nested"]),
    "nested by indentation": (
        ENDPOINTS + "tree:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 400)),
        ["nested"],
    ),
    "nested in what is the user's own": (ENDPOINTS + f"x-a: {NESTED}\n", ["line 3", "nested"]),
    "an anchor in itself": (ENDPOINTS + "x-a: &a [*a]\n", ["line 3", "itself"]),
    "a bomb of anchors": (ENDPOINTS + "x-0: &a0 [a]\n" + BOMB, ["anchors"]),
    "a bomb of anchors in use": (ENDPOINTS + "x-0: &a0 [ngram]\n" + BOMB + "fallback: *a8\n", ["anchors"]),
    "a bomb of merges": (
        ENDPOINTS + "x-0: &a0 {a: 1}\n" + BOMB.replace("[", "{<<: [").replace("]", "]}") + "tree: {<<: *a8}\n",
        ["anchors"],
    ),
    "very many values": (ENDPOINTS + f"fallback: [{'ngram, ' * 10_000}]\n", ["line 3", "more than 10000 values"]),
    "very long": (ENDPOINTS + "#" * 2_000_000, ["larger than"]),
    "a second document": (ENDPOINTS + "---\ntree: {}\n", ["line 3", "second document"]),
    "a merge of text": (ENDPOINTS + "tree: {<<: a}\n", ["line 3", "<<"]),
    "a merge of numbers": (ENDPOINTS + "tree: {<<: [1]}\n", ["line 3", "<<"]),
    "a null byte": ("draft_endpoints: \x00\n", ["line 1", "U+0000"]),
    "tabs": ("draft_endpoints:\n\t- {name: a}\n", ["line 2", "spaces"]),
}


@pytest.mark.parametrize(("text", "fragments"), SHAPES.values(), ids=SHAPES.keys())
def test_files_of_an_odd_shape(file: Path, text: str, fragments: list[str]) -> None:
    message = refused(file, text)
    for fragment in fragments:
        assert fragment in message


MANY = {
    "keys": ENDPOINTS + "".join(f"k{number}: 1\n" for number in range(4000)),
    "values": ENDPOINTS + f"vocabulary_may_differ: [{'a, ' * 9000}]\n",
    "endpoints": f"draft_endpoints: [{'a, ' * 9000}]\n",
}


@pytest.mark.parametrize("text", MANY.values(), ids=MANY.keys())
def test_very_many_faults_are_told_by_the_first_and_their_number(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"; and (3990|8990) more$") as caught:
        load_settings(file)
    assert len(str(caught.value)) < 2000 + len(str(file))


def test_a_number_as_a_name_is_said_to_need_quotes(file: Path) -> None:
    message = refused(file, "draft_endpoints: [{name: 12, url: http://h}]\n")
    assert message == "draft_endpoints.0.name: 12: input should be a valid string (put it in quotes)"


def test_a_number_that_is_tagged_as_text_is_text(file: Path) -> None:
    [endpoint] = load(file, "draft_endpoints: [{name: !!str 012, url: !!str https://h}]\n").draft_endpoints
    assert endpoint.name == "012"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings(file: Path, encoding: str) -> None:
    file.write_bytes((ENDPOINTS + "# größer\n").encode(encoding))
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert str(caught.value).startswith(f"{file}: is not ")
    assert str(caught.value).isprintable()


def test_utf_8_with_a_byte_order_mark(file: Path) -> None:
    file.write_bytes(ENDPOINTS.encode("utf-8-sig"))
    assert load_settings(file).draft_endpoints[0].name == "eu"


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)  # nobody writes to it: a reader would wait for ever
    for path in (Path("/dev/null"), pipe):
        with pytest.raises(ConfigError, match="is not a regular file"):
            load_settings(path)


@pytest.mark.parametrize("name", ["a\0b", "a\nb"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(f"{tmp_path}/{name}")
    assert "cannot be read" in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_empty_path_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, "")
    with pytest.raises(ConfigError, match=f"--additional-config.*{CONFIG_ENV}"):
        settings_path({})


# What is clearly meant


def test_words_that_can_only_mean_off(file: Path) -> None:
    settings = load(file, ENDPOINTS + "late: {policy: off}\nfallback: off\nevents: off\nmetrics: no\n")
    assert settings.late.policy == "none"
    assert (settings.fallback, settings.events, settings.metrics) == ((), None, None)


def test_plain_values_are_what_they_look_like(file: Path) -> None:
    settings = load(
        file,
        ENDPOINTS
        + """
length: {shut_off: no, max: 8}
late: {max_wait_ms: 2}
tree: {entropy_threshold_nats: .inf, min_probability: 0.5, max_nodes: 64}
metrics: {port: 9464, host: 0.0.0.0}
events: '2026-11-27.jsonl'
fallback: [ngram]
""",
    )
    assert (settings.length.shut_off, settings.length.max, settings.late.max_wait_ms) == (False, 8, 2.0)
    assert (settings.tree.entropy_threshold_nats, settings.tree.min_probability) == (float("inf"), 0.5)
    assert settings.metrics is not None
    assert (settings.metrics.port, settings.metrics.host) == (9464, "0.0.0.0")
    assert settings.events == "2026-11-27.jsonl"


def test_a_number_with_an_exponent(file: Path) -> None:
    settings = load(file, ENDPOINTS + "tree: {min_probability: 2e-2, entropy_threshold_nats: 1E0}\n")
    assert (settings.tree.min_probability, settings.tree.entropy_threshold_nats) == (0.02, 1.0)


# Keys of the user's own


OWN = """
x-common: &c {token_env: EU_TOKEN, x-site: eu}
x-tree: &t
  max_nodes: 64
  max_branches: 2
x-since: 2026-13-45
x-mode: 0755
draft_endpoints:
  - {<<: *c, name: eu, url: 'https://h:1', x-owner: [a, b]}
  - <<: [*c, {name: nobody, url: 'http://nobody'}]
    name: us
    url: https://h:2
tree:
  <<: *t
  max_branches: 3
"""


def test_keys_of_the_user_s_own_and_merges(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EU_TOKEN", "secret")
    settings = load(file, OWN)
    assert [(e.name, e.url, e.token()) for e in settings.draft_endpoints] == [
        ("eu", "https://h:1", "secret"),
        ("us", "https://h:2", "secret"),
    ]
    assert (settings.tree.max_nodes, settings.tree.max_branches) == (64, 3)


@pytest.mark.parametrize(
    ("text", "key"), [("tree: {x-a: 1}\n", "tree.x-a"), ("X-a: 1\n", "X-a"), ("xa: 1\n", "xa"), ("'x-': 1\n", "x-")]
)
def test_what_is_no_key_of_the_user_s_own(file: Path, text: str, key: str) -> None:
    message = refused(file, ENDPOINTS + text)
    assert message.startswith(f"{key}: is not a known key; known here: ")


# A request's own settings


@pytest.mark.parametrize("text", ["max_branches=010", "max_nodes=1_000", "max_nodes=0_8", "lookahead_tokens=0012"])
def test_odd_numbers_of_a_request(text: str) -> None:
    with pytest.raises(ConfigError, match="decimal"):
        TreeSettings().overridden(text)


def test_line_ends_of_a_request_reach_no_log() -> None:
    with pytest.raises(ConfigError) as caught:
        TreeSettings().overridden("max\nERROR something else=1")
    assert str(caught.value).isprintable()


def test_a_key_of_a_request_given_twice() -> None:
    with pytest.raises(ConfigError, match="max_nodes is given twice"):
        TreeSettings().overridden("max_nodes=64,max_branches=2,max_nodes=128")


# Anything at all


WORDS = [*"?:-[]{}\"'#0F ", "tree:", "x-a:", "<<:", "&a", "*a", "!!int", "!x", "1e9", "\\U"]
PIECES = st.sampled_from(
    [*WORDS, *ENDPOINTS.splitlines(keepends=True), "|\n", ">\n", "\n", "  ", "\t", "%YAML 1.1\n", "---\n", "...\n"]
)


@example('"\\UFFFFFFFF"')
@example("%YAML 1." + "9" * 5000 + "\n--- a")
@example("? [a]\n: b")
@example("- &a [*a]")
@example("!!map [a]")
@example("!!seq {a: b}")
@example("? &a x\n: 1\n*a : 2")
@given(st.text() | st.lists(PIECES | st.text(max_size=3)).map("".join))
def test_any_text_is_read_or_told_in_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_settings(file), Settings)
    except ConfigError as error:
        assert str(error).startswith(f"{file}: ")
        assert str(error).isprintable()
