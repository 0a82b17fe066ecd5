"""Measure what each kind of bench prompt gives: how much text, how foreseeable by the draft, how much of it repeated.

Along the target's own greedy continuations in float32, cut as for the evaluation. What ends or repeats itself before
``MIN_CUT`` tokens is counted as unusable and left out of the other figures, as the benchmarks leave it out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import data
import numpy as np
import torch
import transformers
from evaluate import continuations
from modelling import load
from transformers import LlamaForCausalLM

from vllm_wanspec.core.policy.lookup import Text
from vllm_wanspec.lab.harness.models import MIN_CUT, REPEAT_SPAN, repeat_cut

BEST = 8  # of the draft's tokens
RESAMPLES = 10_000
OTHERS = "prompts"  # the file to compare with


@dataclass(frozen=True)
class Continued:
    """What became of one prompt: the tokens before the cut, and what would have foreseen each of them.

    Attributes:
        ranks: int64 [tokens]; how many tokens the draft finds likelier than the target's.
        looked_up: bool [tokens]; whether prompt lookup's next token is the target's.
    """

    kind: str
    ranks: np.ndarray
    looked_up: np.ndarray


@torch.inference_mode()
def ranks(draft: LlamaForCausalLM, prompt: list[int], continuation: list[int]) -> np.ndarray:
    """How many tokens the draft finds likelier than each of the continuation's; int64 [tokens]."""
    ids = torch.tensor([prompt + continuation])
    logits = draft(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
    wanted = logits.gather(-1, torch.tensor(continuation)[:, None])
    return (logits > wanted).sum(-1).numpy()


def looked_up(prompt: list[int], continuation: list[int]) -> np.ndarray:
    """Where prompt lookup on all text before gives the continuation's token; bool [tokens]."""
    text, right = Text(), []
    text.append(prompt)
    for token in continuation:
        right.append(text.continuation(1)[1] == [token])
        text.append([token])
    return np.array(right, dtype=bool)


def interval(shares: list[np.ndarray], rng: np.random.Generator) -> list[float]:
    """95 % bootstrap interval over prompts of the share of true entries in all of ``shares``, bool [tokens] each."""
    true, size = np.array([share.sum() for share in shares]), np.array([len(share) for share in shares])
    picks = rng.integers(len(shares), size=(RESAMPLES, len(shares)))
    drawn = true[picks].sum(1) / size[picks].sum(1)
    return [round(float(bound), 4) for bound in np.quantile(drawn, (0.025, 0.975))]


def row(texts: list[Continued], seed: int) -> dict[str, object]:
    """The figures of some prompts together."""
    usable = [text for text in texts if len(text.ranks) >= MIN_CUT]
    first = [text.ranks == 0 for text in usable]
    repeated = [text.looked_up for text in usable]
    begun = [right[:MIN_CUT] for right in repeated]
    positions = sum(map(len, first))
    return {
        "prompts": len(texts),
        "usable": len(usable),
        "mean_tokens": round(positions / len(usable), 1),
        "agreement": round(float(np.concatenate(first).mean()), 4),
        "agreement_95": interval(first, np.random.default_rng(seed)),
        "outside_best_eight": round(float(np.mean(np.concatenate([text.ranks for text in usable]) >= BEST)), 4),
        "lookup_right": round(float(np.concatenate(repeated).mean()), 4),
        "lookup_right_95": interval(repeated, np.random.default_rng(seed)),
        "lookup_right_first": round(float(np.mean(begun)), 4),
        "lookup_right_first_95": interval(begun, np.random.default_rng(seed)),
    }


def table(rows: dict[str, dict]) -> str:
    """The rows as a Markdown table."""
    head = (
        f"| kind | usable | tokens | agreement | outside best {BEST} | lookup right | in the first {MIN_CUT} tokens |"
    )
    lines = [head, "|" + " --- |" * 7]
    for kind, found in rows.items():
        cells = [f"{found['usable']} of {found['prompts']}", f"{found['mean_tokens']:.1f}"]
        for name in ("agreement", "outside_best_eight", "lookup_right", "lookup_right_first"):
            bounds = " ({:.3f}–{:.3f})".format(*found[f"{name}_95"]) if f"{name}_95" in found else ""
            cells.append(f"{found[name]:.3f}{bounds}")
        lines.append(f"| {' | '.join([kind, *cells])} |")
    return "\n".join(lines)


def run(out: Path, new_tokens: int, seed: int) -> None:
    """Measure OUT/target and OUT/draft on OUT/bench_prompts.jsonl by kind, and on all of OUT/prompts.jsonl.

    Writes OUT/kinds.json and prints its table.
    """
    target, draft, tokenizer = load(out / "target"), load(out / "draft"), data.load_tokenizer(out / "target")
    records = data.read_prompts(out / "bench_prompts.jsonl")
    records += [{**record, "kind": OTHERS} for record in data.read_prompts(out / f"{OTHERS}.jsonl")]
    prompts = [tokenizer.encode(record["prompt"]).ids for record in records]
    texts = []
    for record, prompt, written in zip(records, prompts, continuations(target, prompts, new_tokens), strict=True):
        kept = written[: repeat_cut(written)]
        found = ranks(draft, prompt, kept) if kept else np.empty(0, dtype=np.int64)
        texts.append(Continued(record["kind"], found, looked_up(prompt, kept)))
    rows = {kind: row(list(group), seed) for kind, group in groupby(texts, lambda text: text.kind)}
    others = rows.pop(OTHERS)
    rows |= {"all": row([text for text in texts if text.kind != OTHERS], seed), f"{OTHERS}.jsonl": others}
    report = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "new_tokens_at_most": new_tokens,
        "repeat_span_tokens": REPEAT_SPAN,
        "shortest_tokens": MIN_CUT,
        "kinds": rows,
    }
    data.write_json(out / "kinds.json", report)
    print(table(report["kinds"]))
