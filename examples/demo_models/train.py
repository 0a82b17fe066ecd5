#!/usr/bin/env python3
"""Train the demo pair: a tokenizer, a small Llama-type target and a smaller draft that share it.

The text is the standard library of the Python that runs this script, without its tests and without the modules in
held_out.txt. `train.py all` runs every step; each step also runs alone, in this order: tokenizer, prompts,
bench-prompts, target, draft, evaluate, kinds. An interrupted target or draft step continues from its last checkpoint
in OUT/work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import data
import numpy as np

KINDS_NEW_TOKENS = 128  # as many as the benchmarks ask for


def newline_first(tokenizer: data.Tokenizer) -> np.ndarray:
    """Which entries of the vocabulary begin with a newline; bool [vocabulary]."""
    return np.array([tokenizer.id_to_token(i).startswith("\u010a") for i in range(tokenizer.get_vocab_size())])


def note(out: Path, step: str, facts: dict) -> None:
    """Keep what a step wants the evaluation to report, beside the checkpoints."""
    path = out / "work" / "notes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    data.write_json(path, {**notes, step: facts})


def plan_from(options: argparse.Namespace, plan: object, prefix: str) -> object:
    """``plan`` with the fields that the command line gives."""
    given = {f.name: getattr(options, f"{prefix}_{f.name}", None) for f in fields(plan)}
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


def step_tokenizer(options: argparse.Namespace) -> None:
    """Train the tokenizer and write it to OUT/target."""
    training, held_out = data.read_library()
    tokenizer = data.train_tokenizer(training)
    data.save_tokenizer(tokenizer, options.out / "target")
    counts = {"modules": len(training), "tokens": len(data.encode_modules(tokenizer, training))}
    kept_back = {"modules": len(held_out), "tokens": len(data.encode_modules(tokenizer, held_out))}
    note(options.out, "data", {"python": sys.version.split()[0], "training": counts, "held_out": kept_back})
    print(f"tokenizer: {counts['tokens']} training tokens, {kept_back['tokens']} held-out tokens", flush=True)


def step_prompts(options: argparse.Namespace) -> None:
    """Cut the prompts from the held-out modules into OUT/prompts.jsonl."""
    tokenizer = data.load_tokenizer(options.out / "target")
    prompts = data.make_prompts(data.read_library()[1], tokenizer, options.seed)
    data.write_prompts(options.out / "prompts.jsonl", prompts)
    print(f"prompts: {len(prompts)} from {len({p['module'] for p in prompts})} modules", flush=True)


def step_bench_prompts(options: argparse.Namespace) -> None:
    """Cut prompts of four kinds from text that the pair is not trained on into OUT/bench_prompts.jsonl."""
    import bench_prompts

    stream, tokenizer = training_stream(options.out)
    prompts = bench_prompts.make_bench_prompts(data.read_library()[1], tokenizer, stream, options.seed)
    data.write_prompts(options.out / "bench_prompts.jsonl", prompts)
    print(f"bench-prompts: {dict(Counter(prompt['kind'] for prompt in prompts))}", flush=True)


def training_stream(out: Path) -> tuple[np.ndarray, data.Tokenizer]:
    """The training tokens [tokens] and the tokenizer."""
    tokenizer = data.load_tokenizer(out / "target")
    return data.encode_modules(tokenizer, data.read_library()[0]), tokenizer


def step_target(options: argparse.Namespace) -> None:
    """Train the target and export it to OUT/target."""
    import learning
    import modelling

    stream, _ = training_stream(options.out)
    plan = plan_from(options, learning.TargetPlan(), "target")
    checkpoint = options.out / "work" / "target.pt"
    model, seconds = learning.train_target(stream, plan, options.seed, checkpoint, not options.no_compile)
    modelling.export(model, options.out / "target", options.out / "target")
    facts = {"plan": asdict(plan), "seed": options.seed, "seconds": round(seconds)}
    note(options.out, "target", {**facts, "parameters": modelling.parameters(model)})


def step_draft(options: argparse.Namespace) -> None:
    """Distil the draft from OUT/target and export it to OUT/draft."""
    import distilling
    import modelling

    stream, tokenizer = training_stream(options.out)
    target, work = options.out / "target", options.out / "work"
    text_plan = distilling.TextPlan()
    plan = plan_from(options, distilling.DraftPlan(), "draft")
    compiled, started = not options.no_compile, time.monotonic()
    groups = distilling.make_groups(target, stream, newline_first(tokenizer), text_plan, options.seed, work, compiled)
    preparing = round(time.monotonic() - started)
    model, seconds = distilling.distil_draft(target, groups, plan, options.seed, work / "draft.pt", compiled)
    modelling.export(model, options.out / "draft", target)
    plans = {"text_plan": asdict(text_plan), "plan": asdict(plan), "seed": options.seed}
    times = {"preparing_seconds": preparing, "seconds": round(seconds)}
    facts = {**plans, **times, "parameters": modelling.parameters(model)}
    note(options.out, "draft", facts)


def step_evaluate(options: argparse.Namespace) -> None:
    """Measure the exported pair on the held-out modules and write OUT/evaluation.json."""
    import evaluate

    evaluate.run(options.out, options.new_tokens)


def step_kinds(options: argparse.Namespace) -> None:
    """Measure the exported pair on each kind of OUT/bench_prompts.jsonl, and write OUT/kinds.json."""
    import kinds

    kinds.run(options.out, KINDS_NEW_TOKENS, options.seed)


STEPS = {
    "tokenizer": step_tokenizer,
    "prompts": step_prompts,
    "bench-prompts": step_bench_prompts,
    "target": step_target,
    "draft": step_draft,
    "evaluate": step_evaluate,
    "kinds": step_kinds,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="STEP")
    for name, step in [*STEPS.items(), ("all", None)]:
        text = step.__doc__ if step else "Run every step in order."
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to and read from")
        command.add_argument("--seed", type=int, default=20, help="seed of every random choice (default: %(default)s)")
        if name in ("target", "draft", "all"):
            add_training(command, name)
        if name in ("evaluate", "all"):
            text = "tokens to continue each prompt by (default: %(default)s)"
            command.add_argument("--new-tokens", type=int, default=256, help=text)
    return parser.parse_args(arguments)


def add_training(command: argparse.ArgumentParser, name: str) -> None:
    """Options of the training steps; without them the committed plan in learning.py holds."""
    command.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    text = "train without torch.compile (needs no C++ compiler)"
    command.add_argument("--no-compile", action="store_true", help=text)
    if name in ("target", "all"):
        command.add_argument("--target-steps", type=int, help="optimizer steps of the target")
        command.add_argument("--target-decay", type=int, help="how many of them, at the end, lower the learning rate")
        command.add_argument("--target-long-steps", type=int, help="how many of them, at the end, use long windows")
    if name in ("draft", "all"):
        command.add_argument("--draft-steps", type=int, help="optimizer steps of the draft")
        command.add_argument("--draft-decay", type=int, help="how many of them, at the end, lower the learning rate")


def main(arguments: list[str] | None = None) -> int:
    """Run one step or all of them; returns the exit status."""
    options = parse(arguments)
    if getattr(options, "threads", 0):
        import torch

        torch.set_num_threads(options.threads)
    started = time.monotonic()
    try:
        for name in STEPS if options.command == "all" else [options.command]:
            STEPS[name](options)
    except (data.DataError, FileNotFoundError) as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        return 1
    print(f"{options.command}: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
