"""What both trainings share (batches, optimizer, schedule, checkpoints), and the training of the target.

Every batch depends on (seed, step) alone, so a run resumed from a checkpoint sees the batches that an unbroken
run sees.
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
from modelling import build
from transformers import LlamaForCausalLM

CHECKPOINT_EVERY = 100  # steps
REPORT_EVERY = 25  # steps


@dataclass(frozen=True)
class Plan:
    """What any training needs: number of steps, peak learning rate, steps of warm-up and of decay."""

    steps: int
    rate: float
    warmup: int
    decay: int


@dataclass(frozen=True)
class TargetPlan(Plan):
    """How the target is trained. Lengths are in tokens; the last ``long_steps`` steps use longer windows."""

    steps: int = 1600
    rate: float = 1.5e-3
    warmup: int = 150
    decay: int = 450
    batch: int = 8
    length: int = 512
    long_steps: int = 100
    long_batch: int = 4
    long_length: int = 1024


def schedule(step: int, plan: Plan) -> float:
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

    def __init__(self, model: LlamaForCausalLM, plan: Plan, seed: int, checkpoint: Path) -> None:
        self.model, self.plan, self.checkpoint = model, plan, checkpoint
        self.identity = {**asdict(plan), "seed": seed}
        self.optimizer = make_optimizer(model, plan.rate)
        self.first, self.seconds = 0, 0.0

    def resume(self) -> None:
        """Continue from the checkpoint if an unbroken run of this plan and seed would have been there too."""
        if not self.checkpoint.is_file():
            return
        saved = torch.load(self.checkpoint, weights_only=True)
        if not self._same_so_far(saved["identity"], saved["step"]):
            print(f"{self.checkpoint} belongs to another plan; starting anew", flush=True)
            return
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.first, self.seconds = saved["step"], saved["seconds"]
        print(f"resumed at step {self.first} from {self.checkpoint}", flush=True)

    def _same_so_far(self, other: dict, step: int) -> bool:
        """Whether the first ``step`` steps are alike under ``other``'s identity: its end may differ, if yet to come."""
        if other == self.identity:
            return True
        end = ("steps", "decay", "long_steps")
        before_end = [plan["steps"] - max(plan["decay"], plan.get("long_steps", 0)) for plan in (other, self.identity)]
        alike = all(other.get(key) == value for key, value in self.identity.items() if key not in end)
        return alike and step <= min(before_end)

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


def train_target(
    stream: np.ndarray, plan: TargetPlan, seed: int, checkpoint: Path, compiled: bool
) -> tuple[LlamaForCausalLM, float]:
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
