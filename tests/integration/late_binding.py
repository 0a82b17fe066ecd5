"""A program: drafts that arrive after a step has been scheduled, under async scheduling, and what is verified in it.

It runs vLLM in this process, on Model Runner V2, with a drafter that is played: nodes are put into the pool right
before a step's drafts are bound, never earlier. What happened, in order, is written as JSON.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

AHEAD = 3
TOKENS = 40
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
OPT_OUT = {"wanspec": "off"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", required=True, help="YAML file; nobody need answer at its endpoint")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=2,
        enforce_eager=True,
        distributed_executor_backend="uni",
        speculative_config={
            "method": "custom_class",
            "model": "vllm_wanspec.RemoteProposer",
            "num_speculative_tokens": 4,
        },
        additional_config={"wanspec": options.config},
    )
    greedy = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
    [plain] = llm.generate([PROMPT], SamplingParams(**greedy, extra_args=OPT_OUT), use_tqdm=False)
    text = [*plain.prompt_token_ids, *plain.outputs[0].token_ids]
    core = llm.llm_engine.engine_core.engine_core
    played = Played(core, text, len(plain.prompt_token_ids))
    [drafted] = llm.generate([PROMPT], SamplingParams(**greedy), use_tqdm=False)
    result = {
        "scheduler": type(core.scheduler).__name__,
        "batch_queue": core.batch_queue_size,
        "plain": list(plain.outputs[0].token_ids),
        "drafted": list(drafted.outputs[0].token_ids),
        "events": played.events,
    }
    options.out.write_text(json.dumps(result), "utf-8")


class Played:
    """The drafter, and whoever notes in which order things happen."""

    def __init__(self, core: Any, text: list[int], prompt: int) -> None:
        from vllm_wanspec.core.messages import PROTOCOL_VERSION, Welcome

        self.events: list[list[Any]] = []
        self.text, self.prompt, self.sent = text, prompt, prompt
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.remote = self.runner.speculator.remote
        self.pool = self.remote._requests.pool
        self.pool.stop()  # whose links would go on looking for a drafter
        [self.link] = self.pool.links
        self.link._loop = None
        self.link.welcome = Welcome(PROTOCOL_VERSION, "played", 2**20, "", 64, 512, 4096)
        schedule, bind = core.scheduler.schedule, self.remote.bind

        def scheduled(*args: Any) -> Any:
            output = schedule(*args)
            self.events.append(["scheduled", len(output.scheduled_spec_decode_tokens)])
            return output

        def bound(scheduler_output: Any, requests: list[str], slots: Any) -> None:
            if scheduler_output.scheduled_spec_decode_tokens:
                self.arrive(requests[0], int(slots[0]))
            bind(scheduler_output, requests, slots)
            step = self.remote._step
            if step.told is not None:
                self.events.append(["verified", step.told()[0].tokens])

        core.scheduler.schedule, self.remote.bind = scheduled, bound

    def arrive(self, request: str, slot: int) -> None:
        """What the text goes on with where the device is now, which nobody on the host knows yet."""
        from vllm_wanspec.core.messages import Nodes
        from vllm_wanspec.core.tree import NodeRecord

        live = self.pool._sessions[request]
        here = int(self.runner.req_states.total_len.gpu[slot])
        until = min(here + AHEAD, len(self.text))
        records = [
            NodeRecord(place - self.prompt + 1, place - self.prompt, self.text[place], -0.01, 0.1)
            for place in range(self.sent, until)
        ]
        self.sent = until
        self.events.append(["arrived", [here, self.text[here:until]]])
        if records:
            self.pool.link_received(self.link, [Nodes(live.number, self.prompt, tuple(records))])


if __name__ == "__main__":
    main()
