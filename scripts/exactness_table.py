"""Makes docs/results/exactness.json and .md of what the exactness tests have noted; see `make exactness`.

That runs it once all of them have passed: a test that fails may have noted some of its figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.harness.running import Outputs
from vllm_wanspec.lab.report.document import Document, Table
from vllm_wanspec.lab.report.writing import Publication

RUNNERS = {"v1": "V1", "mrv2": "MRV2", "mrv2-async": "MRV2, async scheduling"}
#: By test what it tries; those of a runner have its name in brackets, others ran on V1.
GREEDY = {
    "test_staggered_greedy_requests_are_exact": "staggered requests",
    "test_greedy_requests_batched_with_sampled_ones_are_exact": "the same, batched with requests at T = 1",
    "test_drafter_killed_and_started_again": "drafter killed and started again",
    "test_greedy_requests_with_a_grammar_are_exact": "structured output, batched with free text",
    "test_greedy_requests_with_parameters_are_exact": "penalties, forbidden words, log-probabilities (V2: logit_bias)",
    "test_chunked_prefill_and_preemption": "chunked prefill and preemption, beside five bad drafters",
    "test_requests_that_end_at_max_model_len": "up to the longest context",
    "test_two_choices_per_request": "n = 2",
    "test_clients_that_leave_in_mid_stream": "clients that leave",
    "test_requests_that_opt_out": "requests that opt out",
    "test_two_ranks_are_exact": "tensor parallelism over two ranks",
}
SAMPLED = {
    "test_the_distribution_is_plain_vllms": "T = 1",
    "test_the_distribution_is_plain_vllms_on_model_runner_v2": "T = 1",
    "test_min_p_and_logit_bias_act_on_drafted_rows": "T = 1, with min_p and logit_bias",
}
SUMMED = ("requests", "tokens", "ties", "accepted", "rejected")


def read(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By test what it has noted; counts that were noted several times are added."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        record = json.loads(line)
        figures = found.setdefault(record.pop("test").rpartition("::")[2], {})
        for name, value in record.items():
            figures[name] = figures.get(name, 0) + value if name in SUMMED else value
    return found


def greedy_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Greedy output, token for token."""
    rows = []
    for function, label in GREEDY.items():
        for runner, name in RUNNERS.items():
            figures = found.get(f"{function}[{runner}]")
            if figures is not None and "requests" in figures:  # else nothing has been compared
                rows.append([label, name, *_counts(figures, "requests", "tokens"), "0", *_counts(figures, *SUMMED[2:])])
    titles = ["workload", "model runner", "requests", "tokens", "differing", "ties", "drafts accepted", "rejected"]
    note = (
        "Tokens of greedy requests against plain `vllm serve`. A test with a differing token fails and is not here; "
        "*ties* are differing tokens that plain vLLM itself gives within 1e-3 in log-probability, after which it is "
        "followed from the other token. Drafts are those that a drafter made: neither prompt lookup's nor what fills "
        "drafts up."
    )
    return Table("Greedy", titles, rows, keys=2, note=note)


def sampled_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Sampled output, by its distribution."""
    rows = []
    for test, figures in found.items():
        function = test.partition("[")[0]
        if function in SAMPLED and "least_p" in figures:
            name = RUNNERS[str(figures["runner"])]
            decided = f"{100 * figures['decided']:.0f} %"
            rows.append([
                SAMPLED[function], name, f"{figures['samples']:,}", f"{figures['least_p']:.2g}",
                decided, *_counts(figures, "accepted", "rejected"),
            ])  # fmt: skip
    titles = ["sampling", "model runner", "samples", "p", "decided against drafts", "drafts accepted", "rejected"]
    note = (
        "Chi-square homogeneity tests of plain vLLM against remote drafts, of the tokens at some positions after four "
        "prompts; p is the smallest, Bonferroni-corrected. A test fails below 0.001. *Decided against drafts*: the "
        "smallest share of samples, of the positions tested, in which a draft was verified there."
    )
    return Table("Sampled", titles, rows, keys=2, note=note)


def _counts(figures: Mapping[str, Any], *names: str) -> list[str]:
    return [f"{figures[name]:,.0f}" if name in figures else "–" for name in names]


def document(found: Mapping[str, Mapping[str, Any]], provenance: Provenance) -> Document:
    """The tables of what was found."""
    return Document(
        title="Exactness, as measured",
        tables=[greedy_table(found), sampled_table(found)],
        warnings=[],
        remarks=[],
        method=["vLLM on the CPU, float32, the demo's models; Model Runner V2 with its kernels interpreted."],
        provenance=str(provenance),
    )


def main(arguments: Sequence[str]) -> int:
    """Read the lines of the first file, and write what the second names, with .json and .md."""
    lines, target = Path(arguments[0]), Path(arguments[1])
    found = read(lines.read_text("utf-8").splitlines())
    unknown = {test.partition("[")[0] for test in found} - GREEDY.keys() - SAMPLED.keys()
    if unknown:
        print(f"not in the table: {', '.join(sorted(unknown))}", file=sys.stderr)
    provenance = Provenance.of_this_run("python scripts/exactness_table.py")
    data = {"tests": found} | provenance.as_json()
    outputs = Outputs(target.with_suffix(".json"), target.with_suffix(".md"))
    Publication(document(found, provenance), data).publish(outputs, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
