"""One arm of the sampling test, as a program: many short sampled continuations of a few prompts, written as JSON.

It runs vLLM in this process, so that it can count what was decided against a draft token: a position counts where a
draft token stood there when the step was verified, whether it was accepted or rejected; bonus tokens do not.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

TOKENS = 9
"""One more than are compared: a request's last token is decided by no draft, since it would need none."""
SPECULATIVE_TOKENS = 4
#: Enough for a whole batch behind its cached prefixes: vLLM's CPU build ends where a seeded request's prefill is cut.
BATCHED_TOKENS = 8192


def main() -> None:
    options = parse()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if options.fault == "expand":
        leave_expand_faulty()
    llm = build(options)
    if options.fault == "accept":
        accept_every_draft()
    watch = watch_of(llm) if options.wanspec else None
    if watch is not None:
        watch.wait_for_drafter(options.link_deadline_s)
    continuations = sample(llm, options)
    result = {"continuations": continuations, "decided": {}, "accepted": 0, "rejected": 0}
    if watch is not None:
        result |= {"decided": watch.decided, "accepted": watch.accepted, "rejected": watch.drafted - watch.accepted}
    options.out.write_text(json.dumps(result), "utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: a list of prompts as token ids")
    parser.add_argument("--samples", type=int, required=True, help="continuations over all prompts")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--first-seed", type=int, required=True)
    parser.add_argument("--wanspec", help="YAML file; without it the arm is plain vLLM")
    parser.add_argument("--fault", choices=("expand", "accept"), help="spoil the arm, to show that the test notices")
    parser.add_argument("--link-deadline-s", type=float, default=60.0)
    parser.add_argument("--sampling", type=sampling_of, default={}, help="JSON: more sampling parameters")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON: more arguments of vllm.LLM")
    return parser.parse_args()


def sampling_of(text: str) -> dict[str, Any]:
    """Sampling parameters from JSON, whose keys are all texts."""
    found: dict[str, Any] = json.loads(text)
    if "logit_bias" in found:
        found["logit_bias"] = {int(token): bias for token, bias in found["logit_bias"].items()}
    return found


def build(options: argparse.Namespace) -> Any:
    from vllm import LLM

    drafts: dict[str, Any] = {}
    if options.wanspec:
        drafts = {
            "speculative_config": {
                "method": "custom_class",
                "model": "vllm_wanspec.RemoteProposer",
                "num_speculative_tokens": SPECULATIVE_TOKENS,
            },
            "additional_config": {"wanspec": options.wanspec},
        }
    return LLM(
        model=options.model,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=options.batch,
        max_num_batched_tokens=BATCHED_TOKENS,
        enforce_eager=True,
        disable_log_stats=True,
        seed=0,
        **drafts,
        **options.engine,
    )


def sample(llm: Any, options: argparse.Namespace) -> list[list[list[int]]]:
    """Per prompt its continuations; every request has a seed of its own."""
    from vllm import SamplingParams, TokensPrompt

    prompts = json.loads(options.prompts.read_text("utf-8"))
    cached = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    llm.generate(cached, SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), use_tqdm=False)
    continuations: list[list[list[int]]] = [[] for _ in prompts]
    for begin in range(0, options.samples, options.batch):
        numbers = range(begin, min(options.samples, begin + options.batch))
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=prompts[number % len(prompts)]) for number in numbers],
            [
                SamplingParams(
                    temperature=1.0,
                    max_tokens=TOKENS,
                    ignore_eos=True,
                    detokenize=False,
                    seed=options.first_seed + number,
                    **options.sampling,
                )
                for number in numbers
            ],
            use_tqdm=False,
        )
        for number, output in zip(numbers, outputs, strict=True):
            continuations[number % len(prompts)].append(list(output.outputs[0].token_ids))
    return continuations


def watch_of(llm: Any) -> "Watch":
    """Who looks over the shoulder of the model runner that vLLM has."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    runner = executor.driver_worker.worker.model_runner
    return WatchV2(runner) if hasattr(runner, "speculator") else WatchV1(runner)


class Watch:
    """Counts positions decided against a draft."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.decided = dict.fromkeys(range(1, TOKENS + 1), 0)
        self.drafted = 0
        self.accepted = 0

    def wait_for_drafter(self, deadline_s: float) -> None:
        end_s = time.monotonic() + deadline_s
        while all(link.welcome is None for link in self.pool.links):
            if time.monotonic() > end_s:
                raise SystemExit("no drafter")
            time.sleep(0.02)

    def count(self, first: int, yielded: int, drafted: int) -> None:
        """One row: positions from ``first`` on, of which the drafts decided all but a bonus token."""
        self.drafted += drafted
        self.accepted += min(drafted, max(0, yielded - 1))
        for position in range(first, first + min(yielded, drafted)):
            if position in self.decided:
                self.decided[position] += 1


class WatchV2(Watch):
    """On Model Runner V2: what was told of each step's drafts, or what the scheduler had of them."""

    def __init__(self, runner: Any) -> None:
        self.remote = runner.speculator.remote
        super().__init__(self.remote._requests.pool)
        self._known: dict[str, int] = {}
        ended = self.remote.ended

        def watched(step: Any, sampled: list[list[int]]) -> Any:
            told = None if step.told is None else step.told()
            for row, (request, tokens) in enumerate(zip(step.requests, sampled, strict=True)):
                drafted = step.lengths[row]
                if told is not None:
                    drafted = min(drafted, len(told[row].tokens))
                first = self._known.get(request, 0) + 1
                self._known[request] = first - 1 + len(tokens)
                self.count(first, len(tokens), drafted if tokens else 0)
            return ended(step, sampled)

        self.remote.ended = watched


class WatchV1(Watch):
    """On the V1 model runner: what the scheduler has laid out, and what the proposer gets."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        super().__init__(runner.drafter.pool)
        self._verified: dict[str, int] = {}
        self._wrap_execute_model()
        self._wrap_propose()

    def _wrap_execute_model(self) -> None:
        execute = self.runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            # vLLM pads rows with -1, which nobody drafted.
            spoken_for = scheduler_output.scheduled_spec_decode_tokens.items()
            self._verified = {request: sum(token >= 0 for token in tokens) for request, tokens in spoken_for}
            return execute(scheduler_output, *args, **kwargs)

        self.runner.execute_model = execute_model

    def _wrap_propose(self) -> None:
        propose = self.runner.drafter.propose

        def watched(sampled: list[list[int]], lengths: Any, contexts: Any, slot_mappings: Any = None) -> Any:
            batch = self.runner.input_batch
            for row, request in enumerate(batch.req_ids[: len(sampled)]):
                first = int(lengths[row]) - len(sampled[row]) - int(batch.num_prompt_tokens[row]) + 1
                self.count(first, len(sampled[row]), self._verified.get(request, 0))
            return propose(sampled, lengths, contexts, slot_mappings)

        self.runner.drafter.propose = watched


def leave_expand_faulty() -> None:
    """Keep the package from mending the CPU build's expansion of sampling parameters."""
    from vllm_wanspec.controller import front

    front.repair_cpu_expand = lambda: False


def accept_every_draft() -> None:
    """Have the rejection sampler accept whatever is drafted."""
    from vllm.v1.sample import rejection_sampler

    draw = rejection_sampler.generate_uniform_probs
    rejection_sampler.generate_uniform_probs = lambda *args, **kwargs: draw(*args, **kwargs) * 1e-9


if __name__ == "__main__":
    main()
