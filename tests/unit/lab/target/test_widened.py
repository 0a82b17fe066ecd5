"""A model with further heads says what it said: they are zeros, in the right places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.target.widened import CONFIG, WEIGHTS, needs_widening, widen

HEADS, SIZE, HIDDEN = 3, 2, 15
Weights = dict[str, Any]


def write(folder: Path, weights: Weights, **config: Any) -> Path:
    folder.mkdir(parents=True)
    known = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": SIZE}
    known |= {"hidden_size": HIDDEN}
    (folder / CONFIG).write_text(json.dumps(known | config))
    (folder / "tokenizer.json").write_text("{}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in weights.items():
        content = values.tobytes()
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def read(folder: Path) -> Weights:
    data = (folder / WEIGHTS).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 8 == 0
    header = json.loads(data[8:begin])
    assert header.pop("__metadata__") == {"format": "pt"}
    ends = [tensor["data_offsets"] for tensor in header.values()]
    assert [first for first, _ in ends] == [0, *(last for _, last in ends[:-1])] and ends[-1][1] == len(data) - begin
    return {
        name: np.frombuffer(
            data[begin + tensor["data_offsets"][0] : begin + tensor["data_offsets"][1]], np.float32
        ).reshape(tensor["shape"])
        for name, tensor in header.items()
    }


def weights() -> Weights:
    rng = np.random.default_rng(0)
    layer = "model.layers.0.self_attn."
    return {
        "model.embed_tokens.weight": rng.random((7, HIDDEN), np.float32),
        **{f"{layer}{name}_proj.weight": rng.random((HEADS * SIZE, HIDDEN), np.float32) for name in "kqv"},
        f"{layer}o_proj.weight": rng.random((HIDDEN, HEADS * SIZE), np.float32),
    }


def attention(weights: Weights, heads: int) -> Any:
    """A layer's output for five tokens, as transformers compute it, without positions."""
    tokens = weights["model.embed_tokens.weight"][:5]
    query, key, value = (
        (tokens @ weights[f"model.layers.0.self_attn.{name}_proj.weight"].T).reshape(5, heads, SIZE) for name in "qkv"
    )
    scores = np.exp(np.einsum("qhd,khd->hqk", query, key))
    mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(axis=-1, keepdims=True), value)
    return mixed.reshape(5, heads * SIZE) @ weights["model.layers.0.self_attn.o_proj.weight"].T


def test_further_heads_add_nothing(tmp_path: Path) -> None:
    before = weights()
    model = write(tmp_path / "model", before)
    assert needs_widening(model, 5) and not needs_widening(model, 3)
    wide = widen(model, 5, tmp_path / "deep" / "wide")
    config = json.loads((wide / CONFIG).read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (5, 5, SIZE)
    assert not needs_widening(wide, 5)
    assert (wide / "tokenizer.json").exists()
    after = read(wide)
    assert [*after] == [*before]
    assert after["model.layers.0.self_attn.q_proj.weight"].shape == (5 * SIZE, HIDDEN)
    assert after["model.layers.0.self_attn.o_proj.weight"].shape == (HIDDEN, 5 * SIZE)
    np.testing.assert_allclose(attention(after, 5), attention(before, 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "weight", "problem"),
    [
        ({"num_key_value_heads": 1}, None, "3 heads do not divide by 5"),
        ({"model_type": "gpt2"}, None, "3 heads do not divide by 5"),
        ({"hidden_size": 16}, None, "3 heads do not divide by 5"),
        ({"num_attention_heads": None}, None, "not a model with attention heads"),
        ({}, ("model.layers.0.self_attn.k_proj.weight", (5, HIDDEN)), r"k_proj.weight: F32 \[5, 15\], expected heads"),
    ],
)
def test_a_model_that_cannot_be_widened(
    tmp_path: Path, config: dict[str, Any], weight: tuple[str, tuple[int, int]] | None, problem: str
) -> None:
    made = weights() | ({weight[0]: np.zeros(weight[1], np.float32)} if weight else {})
    model = write(tmp_path / "model", made, **config)
    with pytest.raises(ConfigError, match=problem):
        widen(model, 5, tmp_path / "wide")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a model with attention heads"):
        needs_widening(tmp_path, 2)


def test_the_demo_s_target_can_be_widened(tmp_path: Path) -> None:
    demo = machine.checkout() / "examples" / "demo_models" / "target"
    assert needs_widening(demo, 2)
    wide = widen(demo, 2, tmp_path / "wide")
    grown = (wide / WEIGHTS).stat().st_size - (demo / WEIGHTS).stat().st_size
    # Layers, projections, three heads (six do not divide the hidden size), bfloat16.
    assert grown == pytest.approx(5 * 4 * 3 * 64 * 320 * 2, abs=1000)
