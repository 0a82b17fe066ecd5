"""The models and prompts that measurements use, and how much of a text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import vllm_wanspec
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.models import Prompt, find_models, read_prompts, repeat_cut

DEMO_MODELS = Path(__file__).parents[4] / "examples" / "demo_models"


def write_prompts(path: Path, modules: str, each: int = 2) -> Path:
    lines = [json.dumps({"module": name, "prompt": f"def {name}{i}("}) for name in modules for i in range(each)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the files of the demo models."""
    root = tmp_path / "models"
    for name in ("target", "draft"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    write_prompts(root / "prompts.jsonl", "abcde")
    write_prompts(root / "bench_prompts.jsonl", "ab")
    return root


def test_models_are_found_where_they_are(models: Path) -> None:
    found = find_models(models)
    assert (found.target, found.draft) == (models / "target", models / "draft")
    assert found.prompts == models / "prompts.jsonl"
    assert found.bench_prompts == models / "bench_prompts.jsonl"


def test_missing_models_say_where_they_were_sought(models: Path) -> None:
    (models / "draft" / "config.json").unlink()
    (models / "prompts.jsonl").unlink()
    (models / "bench_prompts.jsonl").unlink()
    with pytest.raises(ConfigError) as caught:
        find_models(models)
    assert str(models) in str(caught.value)
    assert "draft/config.json, prompts.jsonl, bench_prompts.jsonl" in str(caught.value)
    assert "--models" in str(caught.value)


def test_models_are_sought_beside_the_package() -> None:
    root = str(Path(vllm_wanspec.__file__).parents[1] / "examples" / "demo_models")
    try:
        assert str(find_models(None).target).startswith(root)
    except ConfigError as error:
        assert root in str(error)


def test_prompts_are_spread_over_modules(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl", "abcdef")
    assert [prompt.module for prompt in read_prompts(path, 3)] == ["a", "c", "e"]
    assert [prompt.module for prompt in read_prompts(path, 6)] == list("abcdef")
    assert [prompt.module for prompt in read_prompts(path, 8)] == [*"abcdef", "a", "d"]
    assert len({prompt.text for prompt in read_prompts(path, 12)}) == 12
    assert read_prompts(path, 5) == read_prompts(path, 5)
    with pytest.raises(ConfigError, match="--prompts: 13 is more than the 12"):
        read_prompts(path, 13)


def test_prompts_are_spread_over_kinds_first(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ["a1", "a2", "b1", "b2", "c1"]  # the module's name and a number
    lines = [{"module": text[0], "kind": "prose", "prompt": text} for text in texts]
    lines += [{"module": "a", "kind": "comment", "prompt": "A1"}, {"module": "d", "prompt": "D1"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def chosen(count: int | None) -> list[str]:
        return [prompt.text for prompt in read_prompts(path, count)]

    assert chosen(1) == ["a1"]
    assert chosen(2) == ["a1", "A1"]
    assert chosen(3) == ["a1", "A1", "D1"]
    assert chosen(4) == ["a1", "A1", "D1", "b1"]  # two of three modules: the first and, in the middle, the second
    assert chosen(5) == ["a1", "A1", "D1", "b1", "c1"]
    assert chosen(None) == chosen(7) == ["a1", "A1", "D1", "b1", "c1", "a2", "b2"]
    assert [prompt.kind for prompt in read_prompts(path, 3)] == ["prose", "comment", "code"]


WRONG_LINES = [
    "{",
    "[1]",
    '{"module": "a"}',
    "3",
    '{"prompt": "b", "kind": ""}',
    '{"prompt": "b", "kind": 3}',
    '{"prompt": "b", "kind": null}',
]


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_prompt_file_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"module": "a", "prompt": "b"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"prompts\.jsonl, line 3: expected"):
        read_prompts(path, 1)


def test_all_prompts_are_the_default(models: Path, tmp_path: Path) -> None:
    assert len(read_prompts(models / "prompts.jsonl", None)) == 10
    assert [prompt.module for prompt in read_prompts(models / "prompts.jsonl", 1)] == ["a"]
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "missing", None)


def test_a_text_is_cut_where_it_begins_to_repeat() -> None:
    assert repeat_cut([]) == 0
    assert repeat_cut(list(range(40))) == 40
    assert repeat_cut([*range(30), *range(30)]) == 30
    assert repeat_cut([*range(30), *range(15)]) == 45  # 15 tokens that recur are not 16
    assert repeat_cut([7] * 40) == 1
    assert repeat_cut([1, 2, 1, 2], span=2) == 2


@pytest.fixture(scope="module")
def bench_prompts() -> dict[str, list[Prompt]]:
    """The committed prompts of the benchmarks by kind."""
    kinds: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(DEMO_MODELS / "bench_prompts.jsonl", None):
        kinds.setdefault(prompt.kind, []).append(prompt)
    return kinds


def test_bench_prompts_are_of_four_kinds_and_none_stands_twice(bench_prompts: dict[str, list[Prompt]]) -> None:
    counts = {kind: len(prompts) for kind, prompts in bench_prompts.items()}
    assert counts == {"code": 48, "docstring": 48, "comment": 48, "prose": 48}
    texts = [prompt.text for prompts in bench_prompts.values() for prompt in prompts]
    assert not [text for text in texts if sum(text in other for other in texts) > 1]  # nor inside another
    assert not [text for text in texts if text != text.rstrip()]


def test_bench_prompts_are_of_text_that_the_pair_never_saw(bench_prompts: dict[str, list[Prompt]]) -> None:
    lines = (DEMO_MODELS / "held_out.txt").read_text("utf-8").splitlines()
    held_out = {line for line in lines if line and not line.startswith("#")}
    for kind in ("code", "docstring", "comment"):
        assert {prompt.module for prompt in bench_prompts[kind]} <= held_out
    names = Counter(prompt.module.split(":")[0] for prompt in bench_prompts["prose"])
    # The training text is the library's .py files without pydoc_data.
    assert set(names) == {"LICENSE.txt", "email/architecture.rst", "idlelib/extend.txt", "pydoc_data.topics"}


def test_bench_prompts_end_where_their_kind_says(bench_prompts: dict[str, list[Prompt]]) -> None:
    def quotes(text: str) -> int:
        return text.count('"""') + text.count("'''")

    def last_lines(kind: str) -> list[list[str]]:
        return [[line.strip() for line in prompt.text.splitlines()[-2:]] for prompt in bench_prompts[kind]]

    assert {quotes(prompt.text) % 2 for prompt in bench_prompts["docstring"]} == {1}
    assert {quotes(prompt.text) % 2 for kind in ("code", "comment") for prompt in bench_prompts[kind]} == {0}
    assert all(before.startswith("#") and last.startswith("#") for before, last in last_lines("comment"))
    assert all(last.endswith((":", "'", '"')) for _, last in last_lines("code"))  # signatures and docstrings
    for kind in ("docstring", "comment", "prose"):  # in the middle of a paragraph and of a line
        assert all(before and len(last.split()) >= 2 for before, last in last_lines(kind))
    assert not [prompt for prompt in bench_prompts["prose"] if ">>>" in prompt.text or "def " in prompt.text]
