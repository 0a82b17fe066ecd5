"""The width bench's result for people: a table for each drafter and load, with its verdict and its profile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from vllm_wanspec.lab.drafter.loads import COMMIT_INTERVAL_S, CONTEXT_TOKENS, LONGEST_LEAD, MAX_NODES, STEADY_LOOKAHEAD
from vllm_wanspec.lab.drafter.width_figures import BAR_RATIO, BAR_WIDTH, MAX_OTHERS, NEAR, Arm, WidthResult
from vllm_wanspec.lab.harness.provenance import Provenance
from vllm_wanspec.lab.report.cells import MARKS, share
from vllm_wanspec.lab.report.document import Document, Table

#: A figure's title and how it is written; a table has those columns that its rows have figures for.
COLUMNS = {
    "width": ("width", "{width}"),
    "running": ("running", "{running:.1f}{few}"),
    "step_ms": ("step ms", "{step_ms:.2f}"),
    "ratio": ("÷ width 1", "{ratio:.2f}"),
    "events_per_s": ("events/s", "{events_per_s:,.0f}"),
    "gap_ms": ("gap ms", "{gap_ms:.2f}"),
    "first_ms": ("first ms", "{first_ms:.1f}"),
    "starts_per_s": ("starts/s", "{starts_per_s:,.0f}"),
    "committed_per_s": ("commits/s", "{committed_per_s:.0f}"),
    "bytes_per_s": ("bytes/s", "{bytes_per_s:,.0f}"),
    "api_cpu": ("API CPU", "{api_cpu:.0%}"),
    "engine_cpu": ("engine CPU", "{engine_cpu:.0%}"),
    "others_cpu": ("others", "{others_cpu:.0%}"),
    "rounds": ("rounds", "{rounds:.0f}"),
    "measured_s": ("measured s", "{measured_s:.1f}"),
}
STEADY_TITLE = "Width: branches that all run"
CHURNING_TITLE = "Commits: branches that are started and stopped all the time"


def width_document(result: WidthResult, provenance: Provenance) -> Document:
    """What a run found, for people."""
    arms = [*((STEADY_TITLE, arm) for arm in result.steady), *((CHURNING_TITLE, arm) for arm in result.churning)]
    unprofiled = "No profile: py-spy is not installed, may not look into processes here, or was not asked."
    return Document(
        title="What running branches cost the drafter",
        tables=[table for title, arm in arms for table in _tables(title, arm)],
        warnings=[text for title, arm in arms for text in _disturbed(title, arm)],
        remarks=[] if any(arm.profile for _, arm in arms) else [unprofiled],
        method=_method(result),
        provenance=str(provenance),
    )


def _tables(title: str, arm: Arm) -> Iterator[Table]:
    figures = [asdict(row) | {"ratio": arm.ratio(row), "few": "" if row.is_near else " (!)"} for row in arm.rows]
    shown = [column for name, column in COLUMNS.items() if name in figures[0]]
    rows = [[form.format_map(found) for _, form in shown] for found in figures]
    remarks = [*(_verdict(arm) if title == STEADY_TITLE else ["Not judged."]), *_few(arm)]
    yield Table(f"{title}; drafter {arm.name}", [name for name, _ in shown], rows, remarks=remarks)
    for process, groups in arm.profile.items():
        lines = [[where, share(part)] for where, part in groups.items()]
        name = f"{process} process at {BAR_WIDTH} branches"
        yield Table(name, ["where", "share of samples"], lines, note="Waiting threads are left out.", level=3)


def _verdict(arm: Arm) -> list[str]:
    row = arm.at_bar
    if row is None:
        return []
    word = {True: "held", False: "missed", None: "not decided, since fewer branches ran"}[arm.held]
    asked = f"at most {BAR_RATIO} is asked for: {word} {MARKS[arm.held]}"
    texts = [f"{BAR_WIDTH} branches take {arm.ratio(row):.2f} × the step of one; {asked}"]
    one_ms = arm.rows[0].engine_cpu * arm.rows[0].step_ms
    engine_ms, api_ms = row.engine_cpu * row.step_ms, row.api_cpu * row.step_ms
    if one_ms:
        texts.append(
            f"Processor time in a step of {BAR_WIDTH} branches: engine {engine_ms:.2f} ms, {engine_ms / one_ms:.2f} × "
            f"its time for one; API server {api_ms:.2f} ms."
        )
    return texts


def _disturbed(title: str, arm: Arm) -> list[str]:
    busy = max(row.others_cpu for row in arm.rows)
    problem = f"other programs took up to {busy:.0%} of the drafter's core: measure again"
    return [f"DISTURBED: {problem} ({title.lower()}; drafter {arm.name})."] if busy > MAX_OTHERS else []


def _few(arm: Arm) -> list[str]:
    few = [str(row.width) for row in arm.rows if not row.is_near]
    if not few:
        return []
    return [
        f"(!) Width {', '.join(few)}: fewer than {NEAR:.0%} of the branches asked for ran, because the text had "
        "too few probable alternatives or they were ruled out too soon."
    ]


def _method(result: WidthResult) -> list[str]:
    options, steady, load = result.options, result.options.steady, result.options.churning
    return [
        f"One session at a time at a real `wanspec drafter` with the demo's draft model, contexts of {CONTEXT_TOKENS} "
        f"tokens of held-out text. Medians of {options.repeats} windows of {options.window_s:g} s, the widths in "
        "changing order. API server and engine of the drafter share one core where the machine has no GPU. `running`: "
        "branches, mean. `events/s`: tokens drafted. CPU: seconds per second; `others`: other programs on the "
        "drafter's core.",
        f"Steady: every position branches into up to {steady.max_branches} tokens, side branches of up to "
        f"{steady.branch_depth} tokens, {STEADY_LOOKAHEAD} tokens of lookahead, {MAX_NODES} nodes; nothing is "
        "committed; when the branches have ended, the next session follows. Measured while at least "
        f"{NEAR:.0%} of the branches run (`measured`: so many seconds of a window): `step` is the mean time between "
        "the arrivals of two successive tokens of a branch at the controller.",
        f"Churning: every position branches into up to {load.max_branches} tokens, branches of up to "
        f"{load.branch_depth} tokens; a played target commits up to {load.commit_tokens} drafted "
        f"token{'s' * (load.commit_tokens > 1)} every {COMMIT_INTERVAL_S * 1e3:.0f} ms (more where the draft is "
        f"{LONGEST_LEAD} tokens ahead), drawn from the tree by the draft model's probabilities. `step`: time that "
        "branches ran divided by the tokens that they gave, starts and stops included; `gap` between two tokens of a "
        "branch and `first` token are the drafter's own means; `commits/s`: tokens.",
    ]
