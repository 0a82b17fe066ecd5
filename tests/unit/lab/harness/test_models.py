"""The models and prompts that measurements use, and how much of a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vllm_wanspec
from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness.models import find_models, read_prompts, repeat_cut


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
    return root


def test_models_are_found_where_they_are(models: Path) -> None:
    found = find_models(models)
    assert (found.target, found.draft, found.prompts) == (models / "target", models / "draft", models / "prompts.jsonl")


def test_missing_models_say_where_they_were_sought(models: Path) -> None:
    (models / "draft" / "config.json").unlink()
    (models / "prompts.jsonl").unlink()
    with pytest.raises(ConfigError) as caught:
        find_models(models)
    assert str(models) in str(caught.value)
    assert "draft/config.json, prompts.jsonl" in str(caught.value)
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


@pytest.mark.parametrize("line", ["{", "[1]", '{"module": "a"}', "3"])
def test_a_wrong_prompt_file_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"module": "a", "prompt": "b"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 3"):
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
