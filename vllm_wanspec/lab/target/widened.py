"""A copy of a small model with more attention heads, so that they divide by a tensor-parallel size.

The further heads have weights of zero: what they add to a layer's output is exactly 0, so the model says what it said.
The demo's target has five heads, which two GPUs cannot share. Heads must divide the hidden size, too, although their
size is given: the library that reads configurations insists on it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from vllm_wanspec.errors import ConfigError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: Bytes of an element, by safetensors' name of its type; the bits of a zero are zeros in all of them.
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
#: Where heads lie: among the rows of the first, among the columns of the last.
ROWS, COLUMNS = ("q_proj", "k_proj", "v_proj"), ("o_proj",)


def needs_widening(model: Path, parts: int) -> bool:
    """Whether a model's heads do not divide by ``parts``."""
    config = _config(model)
    return bool(config["num_attention_heads"] % parts)


def widen(model: Path, parts: int, folder: Path) -> Path:
    """Write a copy with as few further heads as make them divide by ``parts``, and the hidden size by them.

    Args:
        model: Folder of a model of Llama's kind, all of its weights in one safetensors file.
        parts: Tensor-parallel size.
        folder: Where to write; made if need be.

    Returns:
        ``folder``.

    Raises:
        ConfigError: The model is not of that kind, or no number of heads will do.
    """
    config = _config(model)
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    hidden = config.get("hidden_size", 0)
    enough = [count for count in range(heads, hidden + 1) if not count % parts and not hidden % count]
    if config.get("model_type") != "llama" or groups != heads or "head_dim" not in config or not enough:
        problem = (
            f"{heads} heads do not divide by {parts}, and only heads of Llama's kind with one key each can be added"
        )
        raise ConfigError(f"{model}: {problem}: give a model that divides")
    wide = enough[0]
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.is_file() and file.name not in (WEIGHTS, CONFIG):
            shutil.copyfile(file, folder / file.name)
    changed = config | {"num_attention_heads": wide, "num_key_value_heads": wide}
    (folder / CONFIG).write_text(json.dumps(changed, indent=2) + "\n", "utf-8")
    size = config["head_dim"]
    (folder / WEIGHTS).write_bytes(_widened((model / WEIGHTS).read_bytes(), heads * size, wide * size))
    return folder


def _config(model: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((model / CONFIG).read_text("utf-8"))
        return config | {"num_attention_heads": int(config["num_attention_heads"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{model}: not a model with attention heads: {type(error).__name__}: {error}") from error


def _widened(data: bytes, before: int, after: int) -> bytes:
    """The content of a safetensors file whose heads take ``after`` rows or columns instead of ``before``.

    The format: 8 bytes with the length of a JSON header, the header, and the tensors' bytes in row-major order.
    """
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    made, parts, place = {}, [], 0
    for name, tensor in header.items():
        if name == "__metadata__":
            made[name] = tensor
            continue
        first, last = tensor["data_offsets"]
        content, shape = _padded(name, tensor, data[begin + first : begin + last], before, after)
        made[name] = {"dtype": tensor["dtype"], "shape": shape, "data_offsets": [place, place + len(content)]}
        place += len(content)
        parts.append(content)
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _padded(name: str, tensor: dict[str, Any], content: bytes, before: int, after: int) -> tuple[bytes, list[int]]:
    layer = name.removesuffix(".weight").rpartition(".")[2]
    axis = 0 if layer in ROWS else 1 if layer in COLUMNS else None
    shape: list[int] = tensor["shape"]
    if axis is None:
        return content, shape
    if len(shape) != 2 or shape[axis] != before or tensor["dtype"] not in WIDTHS:
        raise ConfigError(f"{name}: {tensor['dtype']} {shape}, expected heads with {before} elements in all")
    whole = np.frombuffer(content, np.uint8).reshape(shape[0], shape[1] * WIDTHS[tensor["dtype"]])
    more = after - before
    padding = ((0, more), (0, 0)) if axis == 0 else ((0, 0), (0, more * WIDTHS[tensor["dtype"]]))
    made = [shape[0] + more, shape[1]] if axis == 0 else [shape[0], shape[1] + more]
    return np.pad(whole, padding).tobytes(), made
