"""fake_vllm with the tree bench's metrics; run as a process.

With ``--differ-at`` only requests that take drafts differ; what requests ask of their tree is written to the log.
"""

import argparse
import io
import json

import fake_vllm

METRICS = """\
wanspec_received_nodes_total {steps}
wanspec_received_bytes_total {bytes}
wanspec_sent_bytes_total 0
wanspec_drafted_tokens_total {drafted}
wanspec_branch_seconds_total 0.25
wanspec_positions_total{{entropy="0-0.25",outcome="agreed"}} {steps}
wanspec_positions_total{{entropy="1-inf",outcome="branch"}} {steps}
wanspec_positions_total{{entropy="1-inf",outcome="outside"}} {steps}
vllm:something_else{{a="b"}} 1.0
"""


class Handler(fake_vllm.Handler):
    """Also knows requests that opt out."""

    def do_GET(self) -> None:
        """Serve the demo's counters, and more."""
        super().do_GET()
        if self.path == "/metrics":
            steps = Handler.steps
            self.wfile.write(METRICS.format(steps=steps, bytes=100 * steps, drafted=3 * steps).encode())

    def do_POST(self) -> None:
        """Differ, if at all, only where drafts are taken."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        override = json.loads(body).get("vllm_xargs", {}).get("wanspec", "")
        print(f"override {override!r}", flush=True)
        self.rfile = io.BytesIO(body)
        if override == "off":  # for this request alone: others are answered at the same time
            self.options = argparse.Namespace(**vars(self.options) | {"differ_at": None})
        super().do_POST()


if __name__ == "__main__":
    fake_vllm.Handler = Handler  # type: ignore[misc]
    fake_vllm.main()
