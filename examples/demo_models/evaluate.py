"""Measure the exported pair on modules it never saw: losses, and how often the draft agrees with the target.

Agreement is measured where speculative decoding needs it: along the target's own greedy continuations of the prompts,
in float32, each continuation cut just before the second occurrence of any 16 token ids (a small model soon loops, and
loops are easy to draft).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import data
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from modelling import END_ID, PAD_ID, greedy, load, parameters, repeat_cut, stored_bytes
from transformers import LlamaForCausalLM

WINDOW = 512  # tokens per loss window
REPEAT_SPAN = 16  # tokens
BATCH = 32  # prompts continued at a time
ENTROPY_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf)  # nats
SAMPLES = 8  # continuations kept as text


@torch.inference_mode()
def loss(model: LlamaForCausalLM, stream: np.ndarray) -> float:
    """Mean cross-entropy in nats per token over consecutive windows of ``stream`` [tokens]."""
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, WINDOW):
        ids = torch.from_numpy(stream[start : start + WINDOW + 1].astype(np.int64))
        if len(ids) < 2:
            break
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        total += F.cross_entropy(logits.float(), ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


def continuations(target: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The target's greedy continuation of each prompt, up to an end-of-text token (left out) and uncut otherwise."""
    written = []
    for start in range(0, len(prompts), BATCH):
        group = prompts[start : start + BATCH]
        length = max(map(len, group))
        contexts = torch.tensor([[PAD_ID] * (length - len(ids)) + ids for ids in group])
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in group])
        rows = greedy(target, contexts, new_tokens, mask).tolist()
        written += [new[: new.index(END_ID)] if END_ID in new else new for new in rows]
        print(f"continued {len(written)}/{len(prompts)} prompts", flush=True)
    return written


@torch.inference_mode()
def positions(draft: LlamaForCausalLM, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """What the draft says at each position of a continuation of n tokens.

    Returns float32 [n, 4]: entropy of the draft's distribution in nats, 1 where its first choice is the target's
    token, 1 where the token is among its first three, and the draft's probability of the token.
    """
    ids = torch.tensor([prompt + continuation])
    logits = draft(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
    wanted = torch.tensor(continuation)
    log_p = F.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    hits = log_p.topk(3, -1).indices == wanted[:, None]
    probability = log_p.gather(-1, wanted[:, None]).exp()[:, 0]
    return torch.stack([entropy, hits[:, 0].float(), hits.any(-1).float(), probability], 1)


def summary(rows: torch.Tensor) -> dict[str, float | int]:
    """Position count, top-1 agreement and top-3 coverage of ``positions`` rows [n, 4]."""
    if not len(rows):
        return {"positions": 0}
    means = rows.mean(0).tolist()
    keys = ("mean_entropy_nats", "top1_agreement", "top3_coverage", "mean_probability")
    return {"positions": len(rows)} | {key: round(value, 4) for key, value in zip(keys, means, strict=True)}


def by_entropy(rows: torch.Tensor) -> list[dict]:
    """``summary`` of the rows in each bucket of the draft's entropy, with the bucket's share of all positions."""
    buckets = []
    for low, high in pairwise(ENTROPY_EDGES):
        inside = rows[(rows[:, 0] >= low) & (rows[:, 0] < high)]
        bounds = {"from_nats": low, "to_nats": None if math.isinf(high) else high}
        buckets.append({**bounds, "share": round(len(inside) / len(rows), 4), **summary(inside)})
    return buckets


def run_lengths(per_prompt: list[torch.Tensor]) -> dict[str, float]:
    """Mean number of tokens in a row that the draft gets right, if asked for at most k from every position."""
    means = {}
    for limit in (2, 4, 8):
        runs = []
        for rows in per_prompt:
            right = rows[:, 1].tolist()
            for start in range(len(right)):
                window = right[start : start + limit]
                runs.append(window.index(0.0) if 0.0 in window else len(window))
        means[str(limit)] = round(sum(runs) / len(runs), 3)
    return means


def by_module(names: list[str], per_prompt: list[torch.Tensor]) -> dict[str, dict]:
    """Agreement of each held-out module's prompts together."""
    groups: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, rows in zip(names, per_prompt, strict=True):
        groups[name].append(rows)
    return {name: summary(torch.cat(rows)) for name, rows in sorted(groups.items())}


def samples(tokenizer: data.Tokenizer, records: list[dict], written: list[list[int]]) -> list[dict]:
    """Evenly spaced prompts with the text of their continuations, cut at the repeat."""
    picks = list(range(0, len(records), len(records) // SAMPLES))[:SAMPLES]
    texts = [tokenizer.decode(written[i][: repeat_cut(written[i], REPEAT_SPAN)]) for i in picks]
    return [{**records[i], "continuation": text} for i, text in zip(picks, texts, strict=True)]


def model_facts(folder: Path, model: LlamaForCausalLM, held_out: np.ndarray, held_out_bytes: int) -> dict:
    """Size and held-out loss of one exported model."""
    nats = loss(model, held_out)
    return {
        "parameters": parameters(model),
        "weights_bytes": stored_bytes(folder),
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "held_out_loss_nats_per_token": round(nats, 4),
        "held_out_bits_per_byte": round(nats * len(held_out) / math.log(2) / held_out_bytes, 4),
    }


def agreement(draft: LlamaForCausalLM, prompts: list[list[int]], written: list[list[int]], names: list[str]) -> dict:
    """Everything measured along the continuations ``written`` of ``prompts``, whose modules are ``names``."""
    cuts = [repeat_cut(ids, REPEAT_SPAN) for ids in written]
    per_prompt = [positions(draft, p, w[:cut]) for p, w, cut in zip(prompts, written, cuts, strict=True) if cut]
    uncut = [positions(draft, p, w) for p, w in zip(prompts, written, strict=True) if w]
    return {
        "prompts": len(prompts),
        "repeat_span_tokens": REPEAT_SPAN,
        "tokens_before_cut": {"mean": round(sum(cuts) / len(cuts), 1), "min": min(cuts), "max": max(cuts)},
        "never_repeat": sum(cut == len(ids) for cut, ids in zip(cuts, written, strict=True)),
        "overall": summary(torch.cat(per_prompt)),
        "overall_uncut": summary(torch.cat(uncut)),
        "by_draft_entropy": by_entropy(torch.cat(per_prompt)),
        "mean_run_of_agreement_by_limit": run_lengths(per_prompt),
        "by_module": by_module([n for n, cut in zip(names, cuts, strict=True) if cut], per_prompt),
    }


def run(out: Path, new_tokens: int) -> None:
    """Measure OUT/target with OUT/draft; write OUT/evaluation.json and print the main numbers."""
    target, draft, tokenizer = load(out / "target"), load(out / "draft"), data.load_tokenizer(out / "target")
    modules = data.read_library()[1]
    held_out = data.encode_modules(tokenizer, modules)
    size = sum(len(module.text.encode()) for module in modules)
    records = data.read_prompts(out / "prompts.jsonl")
    prompts = [tokenizer.encode(record["prompt"]).ids for record in records]
    written = continuations(target, prompts, new_tokens)
    along = agreement(draft, prompts, written, [record["module"] for record in records])
    notes = out / "work" / "notes.json"
    report = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "held_out": {"modules": [module.name for module in modules], "tokens": len(held_out), "bytes": size},
        "target": model_facts(out / "target", target, held_out, size),
        "draft": model_facts(out / "draft", draft, held_out, size),
        "greedy": {"new_tokens_at_most": new_tokens, **along},
        "samples": samples(tokenizer, records, written),
        "training": json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else None,
    }
    data.write_json(out / "evaluation.json", report)
    print(json.dumps({"target": report["target"], "draft": report["draft"], **report["greedy"]}, indent=1))
