"""The two Llama-type models of the demo pair: their shapes, batched greedy decoding, and export for vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from data import CONTEXT_LENGTH, VOCAB_SIZE, write_json
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

HEAD_DIM = 64
END_ID, PAD_ID = 0, 1  # the tokenizer's specials come first
SHAPES = {
    "target": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 5, "num_attention_heads": 5},
    "draft": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2},
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def build(name: str, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model of shape ``SHAPES[name]``, float32, with tied embeddings."""
    torch.manual_seed(seed)
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        head_dim=HEAD_DIM,
        num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        **shape,
    )
    return LlamaForCausalLM(config)


def load(folder: Path) -> LlamaForCausalLM:
    """Load an exported model as float32, ready to evaluate."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no exported model: run the steps before this one")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def parameters(model: LlamaForCausalLM) -> int:
    """Number of parameters, the tied embedding counted once."""
    return sum(p.numel() for p in model.parameters())


def export(model: LlamaForCausalLM, folder: Path, tokenizer_folder: Path) -> None:
    """Write config, bfloat16 weights (the tied embedding once), generation settings and the tokenizer to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"}
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k not in tied}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    settings = json.loads(model.config.to_json_string(use_diff=False))
    keep = set(json.loads(model.config.to_json_string())) | {"max_position_embeddings", "tie_word_embeddings"}
    config = {key: value for key, value in settings.items() if key in keep and value is not None}
    config.pop("_name_or_path", None)
    rope = config.get("rope_parameters") or {}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "head_dim": HEAD_DIM,
        "rope_theta": rope.get("rope_theta", 10000.0),
    }
    write_json(folder / "config.json", dict(sorted(config.items())))
    specials = {"bos_token_id": END_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    write_json(folder / "generation_config.json", specials)
    if tokenizer_folder.resolve() != folder.resolve():
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_folder / name, folder / name)


def stored_bytes(folder: Path) -> int:
    """Size of the exported weights in bytes."""
    weights = folder / "model.safetensors"
    load_file(weights)  # raises on a damaged file
    return weights.stat().st_size


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, grown in place in room for ``size`` tokens instead of copied at every step."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple:
        """Append states [batch, heads, new, head_dim]; return views of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            self.room = torch.empty(2, batch, heads, self.size, width, dtype=key_states.dtype)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.room[0, :, :, start:end] = key_states
        self.room[1, :, :, start:end] = value_states
        self.keys, self.values = self.room[0, :, :, :end], self.room[1, :, :, :end]
        return self.keys, self.values


@torch.inference_mode()
def greedy(
    model: LlamaForCausalLM, contexts: torch.Tensor, new_tokens: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Continue contexts greedily.

    ``contexts``: int64 [batch, length]; ``mask``: int64 [batch, length], 0 where a shorter context is padded on the
    left (None: all equally long). Returns int64 [batch, new_tokens]; decoding runs on past an end-of-text token, so
    the caller cuts there where that matters.
    """
    batch, length = contexts.shape
    cache = Cache(layers=[RoomyLayer(length + new_tokens) for _ in range(model.config.num_hidden_layers)])
    out = torch.empty(batch, new_tokens, dtype=torch.long)
    step, extra = contexts, {}
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(batch, new_tokens)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
    for i in range(new_tokens):
        if mask is not None:
            end = length + i
            extra = {"attention_mask": mask[:, :end], "position_ids": places[:, end - step.shape[1] : end]}
        logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra).logits
        out[:, i] = logits[:, -1].argmax(-1)
        step = out[:, i : i + 1]
    return out


def repeat_cut(ids: list[int], span: int = 16) -> int:
    """How many of ``ids`` come before the second occurrence of any ``span`` consecutive ids (all, when none recurs)."""
    seen: set[tuple[int, ...]] = set()
    for start in range(len(ids) - span + 1):
        gram = tuple(ids[start : start + span])
        if gram in seen:
            return start
        seen.add(gram)
    return len(ids)
