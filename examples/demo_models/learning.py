"""Training of the demo pair: the target on library text, then the draft distilled from the target.

Every batch depends on (seed, step) alone, so a run resumed from a checkpoint sees the batches that an unbroken run sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from modelling import END_ID, build, greedy, load, repeat_cut
from transformers import LlamaForCausalLM

CHECKPOINT_EVERY = 100  # steps
REPORT_EVERY = 25  # steps


@dataclass(frozen=True)
class TargetPlan:
    """How the target is trained. Lengths are in tokens; the last ``long_steps`` steps use longer windows."""

    steps: int = 3000
    batch: int = 8
    length: int = 512
    long_steps: int = 300
    long_batch: int = 4
    long_length: int = 1024
    rate: float = 1.5e-3
    warmup: int = 150
    decay: int = 700


@dataclass(frozen=True)
class DraftPlan:
    """How the draft is distilled: ``texts`` greedy texts of ``length`` tokens first, then ``steps`` steps."""

    texts: int = 1536
    text_batch: int = 96
    length: int = 640
    min_context: int = 32
    max_context: int = 256
    steps: int = 1500
    batch: int = 16
    greedy_share: float = 0.75
    repeated_weight: float = 0.1
    label_weight: float = 0.3
    rate: float = 3e-3
    warmup: int = 100
    decay: int = 500


def schedule(step: int, plan: TargetPlan | DraftPlan) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, level, then half a cosine over the last steps."""
    left = plan.steps - step
    rise = min(1.0, (step + 1) / plan.warmup)
    fall = 0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * min(1.0, left / plan.decay)))
    return min(rise, fall)


def windows(stream: np.ndarray, length: int, count: int, rng: np.random.Generator) -> torch.Tensor:
    """``count`` random windows of ``length`` tokens of ``stream`` [tokens]; int64 [count, length]."""
    starts = rng.integers(0, len(stream) - length, size=count)
    return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))


def make_optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (the norms) do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


class Loop:
    """Optimizer steps with a schedule, checkpoints and a progress line."""

    def __init__(self, model: LlamaForCausalLM, plan: TargetPlan | DraftPlan, seed: int, checkpoint: Path) -> None:
        self.model, self.plan, self.checkpoint = model, plan, checkpoint
        self.identity = {**asdict(plan), "seed": seed}
        self.optimizer = make_optimizer(model, plan.rate)
        self.first, self.seconds = 0, 0.0

    def resume(self) -> None:
        """Continue from the checkpoint if it belongs to the same plan and seed.

        Another number of steps is fine while the rate is still level: what was done is then the same in both plans.
        """
        if not self.checkpoint.is_file():
            return
        saved = torch.load(self.checkpoint, weights_only=True)
        level_until = min(saved["identity"]["steps"], self.plan.steps) - self.plan.decay
        same = {**saved["identity"], "steps": self.plan.steps} == self.identity
        if not same or (saved["identity"]["steps"] != self.plan.steps and saved["step"] > level_until):
            print(f"{self.checkpoint} belongs to another plan; starting anew", flush=True)
            return
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.first, self.seconds = saved["step"], saved["seconds"]
        print(f"resumed at step {self.first} from {self.checkpoint}", flush=True)

    def save(self, step: int) -> None:
        """Write the checkpoint after ``step`` steps, replacing the last one in one move."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": step, "seconds": self.seconds, "identity": self.identity}, part)
        part.replace(self.checkpoint)

    def run(self, loss_of: Callable[[int], torch.Tensor], label: str) -> float:
        """Run the steps left; ``loss_of(step)`` gives the scalar loss. Returns seconds of training so far."""
        self.resume()
        steps, recent, started, done_before = self.plan.steps, [], time.monotonic(), self.seconds
        for step in range(self.first, steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.rate * schedule(step, self.plan)
            loss = loss_of(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            recent.append(loss.detach())
            elapsed = time.monotonic() - started
            self.seconds = done_before + elapsed
            if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
                mean, recent = torch.stack(recent).mean().item(), []
                left = elapsed / (step + 1 - self.first) * (steps - step - 1)
                line = f"{label} step {step + 1}/{steps} loss {mean:.4f} {self.seconds:.0f} s, {left / 60:.1f} min left"
                print(line, flush=True)
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
                self.save(step + 1)
        return self.seconds


def autocast() -> torch.autocast:
    """bfloat16 arithmetic on the CPU; weights stay float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def train_target(stream: np.ndarray, plan: TargetPlan, seed: int, checkpoint: Path, compiled: bool) -> tuple:
    """Train the target on ``stream`` [tokens]. Returns (model, seconds)."""
    model = build("target", seed)

    def objective(ids: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of windows ``ids`` [batch, length + 1]."""
        with autocast():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    objective_fast = torch.compile(objective, dynamic=False) if compiled else objective

    def loss_of(step: int) -> torch.Tensor:
        long = step >= plan.steps - plan.long_steps
        count, length = (plan.long_batch, plan.long_length) if long else (plan.batch, plan.length)
        return objective_fast(windows(stream, length + 1, count, np.random.default_rng([seed, 1, step])))

    return model, Loop(model, plan, seed, checkpoint).run(loss_of, "target")


def _line_end_cuts(stream: np.ndarray, newline_first: np.ndarray) -> np.ndarray:
    """Positions in ``stream`` whose token begins with a newline, i.e. where a line has just ended."""
    return np.flatnonzero(newline_first[stream])


def greedy_texts(
    target: LlamaForCausalLM, stream: np.ndarray, newline_first: np.ndarray, plan: DraftPlan, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training contexts with the target's greedy continuations.

    Every other context of a batch ends at the end of a line, the rest anywhere. ``newline_first`` is bool [vocabulary].
    Returns ids uint16 [texts, length] and weights float32 [texts, length]: the weight of *predicting* that token, 0 in
    the context's first token, ``repeated_weight`` from where 16 tokens recur, 0 after an end-of-text that the target wrote.
    """
    cuts = _line_end_cuts(stream, newline_first)
    cuts = cuts[cuts > plan.max_context]
    ids, weights, started = [], [], time.monotonic()
    for number in range(math.ceil(plan.texts / plan.text_batch)):
        rng = np.random.default_rng([seed, 2, number])
        length = int(rng.integers(plan.min_context, plan.max_context + 1))
        ends = rng.integers(length, len(stream), size=plan.text_batch)
        ends[::2] = rng.choice(cuts, size=len(ends[::2]))
        contexts = torch.from_numpy(np.stack([stream[e - length : e] for e in ends]).astype(np.int64))
        written = greedy(target, contexts, plan.length - length)
        ids.append(torch.cat([contexts, written], 1).numpy().astype(np.uint16))
        weights.append(np.stack([_weights(row.tolist(), length, plan) for row in written]))
        seconds = time.monotonic() - started
        print(f"greedy texts {(number + 1) * plan.text_batch}/{plan.texts} {seconds:.0f} s", flush=True)
    return np.concatenate(ids)[: plan.texts], np.concatenate(weights)[: plan.texts]


def _weights(written: list[int], context: int, plan: DraftPlan) -> np.ndarray:
    """Weights float32 [length] of one text: see ``greedy_texts``."""
    weights = np.ones(plan.length, dtype=np.float32)
    weights[:context] = 0.25
    weights[0] = 0.0
    weights[context + repeat_cut(written) :] = plan.repeated_weight
    if END_ID in written:
        weights[context + written.index(END_ID) + 1 :] = 0.0
    return weights


def distil_draft(
    target_folder: Path, stream: np.ndarray, newline_first: np.ndarray, plan: DraftPlan, seed: int, work: Path, compiled: bool
) -> tuple:
    """Distil the draft from the exported target. Returns (model, seconds of text writing, seconds of training)."""
    store, started = work / "greedy_texts.npz", time.monotonic()
    texts, weights = greedy_texts(load(target_folder).to(torch.bfloat16), stream, newline_first, plan, seed)
    target = load(target_folder)
    work.mkdir(parents=True, exist_ok=True)
    np.savez(store, texts=texts, weights=weights)
    writing = time.monotonic() - started
    model = build("draft", seed + 1)
    draft_forward = torch.compile(model, dynamic=False) if compiled else model
    target_forward = torch.compile(target, dynamic=False) if compiled else target
    from_texts = round(plan.batch * plan.greedy_share)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 3, step])
        rows = rng.integers(0, len(texts), size=from_texts)
        library = windows(stream, plan.length, plan.batch - from_texts, rng)
        ids = torch.cat([torch.from_numpy(texts[rows].astype(np.int64)), library])
        weight = torch.ones(ids.shape)
        weight[:from_texts] = torch.from_numpy(weights[rows])
        with autocast():
            with torch.no_grad():
                wanted = target_forward(input_ids=ids[:, :-1], use_cache=False).logits
            logits = draft_forward(input_ids=ids[:, :-1], use_cache=False).logits
        return distillation_loss(logits, wanted, ids[:, 1:], weight[:, 1:], plan.label_weight)

    return model, writing, Loop(model, plan, seed, work / "draft.pt").run(loss_of, "draft")


def distillation_loss(
    logits: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, label_weight: float
) -> torch.Tensor:
    """Weighted mean of KL(target || draft) + ``label_weight`` x cross-entropy of the next token, in nats.

    ``logits`` and ``wanted`` [batch, length, vocabulary] are the draft's and the target's; ``labels`` and ``weight``
    [batch, length].
    """
    log_draft = F.log_softmax(logits.float(), -1)
    log_target = F.log_softmax(wanted.float(), -1)
    divergence = (log_target.exp() * (log_target - log_draft)).sum(-1)
    surprise = -log_draft.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return ((divergence + label_weight * surprise) * weight).sum() / weight.sum()
