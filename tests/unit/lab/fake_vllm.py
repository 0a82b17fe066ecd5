"""A stand-in for vLLM's servers, run as a process: /health, /v1/completions and /metrics.

The n-th generated token of a prompt depends on the prompt alone, so two of these agree, except that one started with
``--differ-at N`` gives another N-th token to requests that do not opt out of drafts. What requests ask of their tree is
written to the log.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, get_ident
from time import sleep
from typing import Any

TOKENS_PER_CHUNK = 2
STEP_S = 0.005  # from one chunk to the next: a reader that is held up for a moment still sees them apart
METRICS = """\
wanspec_drafter_up{{drafter="demo"}} 1.0
wanspec_steps_total {steps}
wanspec_committed_tokens_total {committed}
wanspec_hits_total {steps}
wanspec_received_nodes_total {steps}
wanspec_received_bytes_total {bytes}
wanspec_sent_bytes_total 0
wanspec_drafted_tokens_total {drafted}
wanspec_branch_seconds_total 0.25
wanspec_positions_total{{entropy="0-0.25",outcome="agreed"}} {steps}
wanspec_positions_total{{entropy="1-inf",outcome="branch"}} {steps}
wanspec_positions_total{{entropy="1-inf",outcome="outside"}} {steps}
vllm:something_else{{a="b"}} 1.0
vllm:iteration_tokens_total_count{{engine="0"}} {steps}
"""
DRAFTS = """\
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {drafts}
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {steps}
"""


def prompt_ids(prompt: str | list[int]) -> list[int]:
    """Token ids of a prompt: a text's bytes."""
    return list(prompt.encode()) if isinstance(prompt, str) else prompt


def generate(ids: list[int], count: int, differ_at: int | None) -> Iterator[int]:
    """The tokens after a prompt."""
    for position in range(count):
        yield (sum(ids) + 7 * position) % 26 + 97 + (position == differ_at)


def write_stats(path: str, steps: int) -> None:
    """Write a pacing statistics file atomically, whatever other requests do."""
    counts = {"steps": steps, "overruns": 0, "paced_ms_total": 0.0, "work_ms_total": 0.0}
    settings = {"async_scheduling": False, "num_spec_tokens": 0}
    scratch = Path(f"{path}.{get_ident()}.tmp")
    scratch.write_text(json.dumps(counts | {f"draft_{name}": 0 for name in counts} | settings))
    scratch.replace(path)


class Handler(BaseHTTPRequestHandler):
    """Answers every path that the demo asks for."""

    options: argparse.Namespace
    steps = 0

    def do_GET(self) -> None:
        """/health, and the controller's counters."""
        body = b""
        if self.path == "/metrics":
            steps = Handler.steps
            counts = {"steps": steps, "committed": TOKENS_PER_CHUNK * steps, "bytes": 100 * steps, "drafted": 3 * steps}
            text = METRICS + (DRAFTS if self.options.speculates else "")
            body = text.format(**counts, drafts=4 * steps).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """/v1/completions."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = prompt_ids(request["prompt"])
        override = request.get("vllm_xargs", {}).get("wanspec", "")
        print(f"override {override!r}", flush=True)
        if self.options.fail_after is not None and Handler.steps > self.options.fail_after:
            print("the engine died", flush=True)
            sys.stdout.flush()
            self.server.shutdown()
            return
        self.send_response(200)
        self.end_headers()
        if request.get("stream"):
            self.stream(ids, request["max_tokens"], None if override == "off" else self.options.differ_at)
        elif "prompt_logprobs" in request:
            ranked = [{str(token): {"rank": 1, "logprob": -0.1}} for token in ids]
            self.wfile.write(json.dumps({"choices": [{"prompt_logprobs": ranked}]}).encode())
        else:
            top = {f"token_id:{token}": -0.7 - self.options.gap * (token % 2) for token in range(97, 124)}
            self.wfile.write(json.dumps({"choices": [{"logprobs": {"top_logprobs": [top]}}]}).encode())

    def stream(self, ids: list[int], count: int, differ_at: int | None) -> None:
        """Send tokens two at a time."""
        tokens = list(generate(ids, count, differ_at))
        for start in range(0, count, TOKENS_PER_CHUNK):
            sleep(STEP_S if start else 0.0)
            Handler.steps += 1
            part = tokens[start : start + TOKENS_PER_CHUNK]
            choice: dict[str, Any] = {"text": "".join(map(chr, part)), "token_ids": part}
            if start == 0:
                choice["prompt_token_ids"] = ids
            self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        write_stats(self.options.stats, Handler.steps)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *unused: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument("--stats", required=True)
    parser.add_argument("--differ-at", type=int)
    parser.add_argument("--gap", type=float, default=0.0)
    parser.add_argument("--fail-after", type=int)
    parser.add_argument("--speculates", action="store_true")
    parser.add_argument("--say", help="a line for the log")
    Handler.options = parser.parse_args()
    if Handler.options.say:
        print(Handler.options.say, flush=True)
    if Handler.options.metrics_port:
        metrics = ThreadingHTTPServer(("127.0.0.1", Handler.options.metrics_port), Handler)
        Thread(target=metrics.serve_forever, daemon=True).start()
    write_stats(Handler.options.stats, 0)
    ThreadingHTTPServer(("127.0.0.1", Handler.options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
