"""The draft's training: distilled from the target, on library text that the target continues greedily.

Speculative decoding asks the draft what the target would say next in the target's own text, so every training row is a
stretch of library text with the target's greedy continuation. The target runs over the rows once, and the draft learns
from what was kept of it: the likeliest tokens and their probabilities at every position.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from learning import Loop, Plan, autocast
from modelling import END_ID, build, greedy, load, repeat_cut
from transformers import LlamaForCausalLM

LABEL_CHUNK = 4096  # tokens that the target labels at a time


@dataclass(frozen=True)
class TextPlan:
    """The rows: groups of (rows, tokens a row); the last ``continuation`` tokens of each are the target's.

    A position weighs ``context_weight`` in the library text, 1 in the continuation, ``repeated_weight`` from where 16
    tokens recur in it, and 0 after an end-of-text that the target wrote. ``kept`` likeliest tokens are kept a position.
    """

    groups: tuple[tuple[int, int], ...] = (*((512, 256),) * 3, (128, 1024), *((512, 256),) * 2)
    continuation: int = 64
    context_weight: float = 0.5
    repeated_weight: float = 0.5
    kept: int = 32


@dataclass(frozen=True)
class DraftPlan(Plan):
    """How the draft is distilled: each step takes about ``tokens`` tokens of rows of one group."""

    steps: int = 3600
    rate: float = 3e-3
    warmup: int = 100
    decay: int = 1200
    tokens: int = 4096
    first_choice_weight: float = 0.5


@dataclass
class Group:
    """Rows of one length: ids uint16 and weights float32 [rows, length], and what the target says after each token.

    ``tokens`` uint16 and ``log_p`` float16 [rows, length - 1, kept]: the likeliest next tokens, best first.
    """

    ids: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray | None = None
    log_p: np.ndarray | None = None


def line_ends(stream: np.ndarray, newline_first: np.ndarray) -> np.ndarray:
    """Positions in ``stream`` of tokens that begin with a newline; ``newline_first`` is bool [vocabulary]."""
    return np.flatnonzero(newline_first[stream])


def write_group(
    target: LlamaForCausalLM, stream: np.ndarray, cuts: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts from ``stream`` [tokens], every other one ending at one of ``cuts``, the rest anywhere.

    ``shape`` is (rows, context tokens, new tokens); returns contexts and continuations, int64 [rows, ...].
    """
    rows, length, new_tokens = shape
    ends = rng.integers(length, len(stream), size=rows)
    ends[::2] = rng.choice(cuts[cuts > length], size=len(ends[::2]))
    contexts = torch.from_numpy(np.stack([stream[end - length : end] for end in ends]).astype(np.int64))
    return contexts, greedy(target, contexts, new_tokens)


def row_weights(written: list[int], context: int, plan: TextPlan) -> np.ndarray:
    """Weights float32 [context + continuation] of predicting each token of a row."""
    weights = np.full(context + len(written), plan.context_weight, dtype=np.float32)
    weights[context:] = 1.0
    weights[context + repeat_cut(written) :] = plan.repeated_weight
    if END_ID in written:
        weights[context + written.index(END_ID) + 1 :] = 0.0
    return weights


def label(target: LlamaForCausalLM, group: Group, kept: int, compiled: bool) -> None:
    """Let the target say what it expects after every token of ``group``."""

    def likeliest(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities float32 and tokens int64 [rows, length, kept] for ``ids`` [rows, length]."""
        with autocast():
            logits = target(input_ids=ids, use_cache=False).logits
        return F.log_softmax(logits.float(), -1).topk(kept, -1)

    run = torch.compile(likeliest, dynamic=False) if compiled else likeliest
    tokens, log_p = [], []
    rows = LABEL_CHUNK // group.ids.shape[1]
    for start in range(0, len(group.ids), rows):
        with torch.no_grad():
            values, choices = run(torch.from_numpy(group.ids[start : start + rows, :-1].astype(np.int64)))
        tokens.append(choices.numpy().astype(np.uint16))
        log_p.append(values.numpy().astype(np.float16))
    group.tokens, group.log_p = np.concatenate(tokens), np.concatenate(log_p)


def make_groups(
    target_folder: Path, stream: np.ndarray, newline_first: np.ndarray, plan: TextPlan, seed: int, work: Path,
    compiled: bool,
) -> list[Group]:  # fmt: skip
    """Write and label every group that ``work`` does not hold already."""
    digest = hashlib.sha256((target_folder / "model.safetensors").read_bytes()).hexdigest()
    writer, labeller, started = load(target_folder).to(torch.bfloat16), load(target_folder), time.monotonic()
    cuts, groups = line_ends(stream, newline_first), []
    work.mkdir(parents=True, exist_ok=True)
    for number, (rows, length) in enumerate(plan.groups):
        store = work / f"group{number}.npz"
        identity = json.dumps({**asdict(plan), "groups": [rows, length], "target": digest, "seed": seed})
        group = _stored(store, identity)
        if group is None:
            rng, context = np.random.default_rng([seed, 2, number]), length - plan.continuation
            contexts, written = write_group(writer, stream, cuts, (rows, context, plan.continuation), rng)
            weights = np.stack([row_weights(row.tolist(), context, plan) for row in written])
            group = Group(torch.cat([contexts, written], 1).numpy().astype(np.uint16), weights)
            print(f"group {number + 1}/{len(plan.groups)} written {time.monotonic() - started:.0f} s", flush=True)
            label(labeller, group, plan.kept, compiled)
            np.savez(store, identity=identity, **vars(group))
        groups.append(group)
        print(f"group {number + 1}/{len(plan.groups)} labelled {time.monotonic() - started:.0f} s", flush=True)
    return groups


def _stored(store: Path, identity: str) -> Group | None:
    """The group in ``store``, if it is there and of this identity."""
    if not store.is_file():
        return None
    with np.load(store) as saved:
        if str(saved["identity"]) != identity:
            return None
        return Group(saved["ids"], saved["weights"], saved["tokens"], saved["log_p"])


def batch(groups: list[Group], plan: DraftPlan, seed: int, step: int) -> tuple[torch.Tensor, ...]:
    """Batch number ``step``: ids [rows, length], weights [rows, length - 1], tokens and log_p [..., kept]."""
    rng = np.random.default_rng([seed, 3, step])
    group = groups[step % len(groups)]
    rows = rng.integers(0, len(group.ids), size=max(1, plan.tokens // group.ids.shape[1]))
    ids, tokens = (torch.from_numpy(part[rows].astype(np.int64)) for part in (group.ids, group.tokens))
    log_p = torch.from_numpy(group.log_p[rows].astype(np.float32))
    return ids, torch.from_numpy(group.weights[rows, 1:]), tokens, log_p


def distillation_loss(
    logits: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor, log_p: torch.Tensor, first_weight: float
) -> torch.Tensor:
    """Weighted mean of KL(target || draft) - ``first_weight`` x log q(the target's first choice), in nats.

    ``logits`` [rows, length, vocabulary] are the draft's; ``weights`` [rows, length]; ``tokens`` and ``log_p``
    [rows, length, kept] are the target's likeliest tokens. All other tokens count as one outcome.
    """
    log_q = F.log_softmax(logits.float(), -1).gather(-1, tokens)
    p, rest_p = log_p.exp(), (1 - log_p.exp().sum(-1)).clamp(min=1e-6)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-6)
    divergence = (p * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
    return ((divergence - first_weight * log_q[..., 0]) * weights).sum() / weights.sum()


def start_from(target: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """A new draft whose embedding holds the leading directions of the target's; the rest is random."""
    draft = build("draft", seed)
    with torch.no_grad():
        rows, sizes, _ = torch.linalg.svd(target.get_input_embeddings().weight, full_matrices=False)
        width = draft.config.hidden_size
        draft.get_input_embeddings().weight.copy_(rows[:, :width] * sizes[:width])
    return draft


def distil_draft(
    target_folder: Path, groups: list[Group], plan: DraftPlan, seed: int, checkpoint: Path, compiled: bool
) -> tuple[LlamaForCausalLM, float]:
    """Distil a new draft from the labelled groups. Returns (model, seconds of training)."""
    model = start_from(load(target_folder), seed + 1)

    def objective(ids: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """Loss of a batch."""
        with autocast():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return distillation_loss(logits, weights, tokens, log_p, plan.first_choice_weight)

    objective_fast = torch.compile(objective, dynamic=False) if compiled else objective
    loop = Loop(model, plan, seed, checkpoint)
    return model, loop.run(lambda step: objective_fast(*batch(groups, plan, seed, step)), "draft")
