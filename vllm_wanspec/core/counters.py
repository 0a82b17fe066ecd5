"""What all sessions of a controller count and learn together, in plain data.

Whoever owns the sessions owns one `Shared` and hands it to each; they write into it, so it has the sessions' lock.
"""

from dataclasses import dataclass, field, fields

from vllm_wanspec.core.draft import Draft
from vllm_wanspec.core.learned.calibration import Calibration
from vllm_wanspec.core.learned.estimates import StepTimes
from vllm_wanspec.core.policy.length import StepCost
from vllm_wanspec.core.policy.lookup import ALL_IDS, LookupRates


@dataclass(slots=True)
class Counters:
    """What sessions count, all in plain numbers; one object serves all sessions of a controller.

    Draft tokens that the target took are counted by who made them: three counters whose sum is vLLM's own
    ``vllm:spec_decode_num_accepted_tokens``, as far as requests have sessions. A step has taken as many as it yielded
    tokens, but for the last, which is the target's own, and at most all of the draft; before vLLM cuts the text.
    Between main line and branch the drafter's knowledge decides. Of a drafted token it knew the commits up to
    `Nodes.seen`. If the target's text has left the most probable path after that, at a position where it took another
    token than the most probable one of the tree, then the token was drafted below an alternative: a branch made it.
    Those that are drafted once the drafter knows are main line again, of a promoted branch as of a new one.

    Attributes:
        steps: Verification steps in which a request with a session got tokens (its prefill not included).
        committed_tokens: Tokens that those steps yielded.
        offered_tokens: Draft tokens handed to the target.
        offered_drafted: Those of them that a drafter made.
        accepted_main_line: Draft tokens that the target took, and that the drafter's main line made.
        accepted_branch: Those that a side branch made, before the drafter knew that the text goes on there. The
            alternative with which the branch began is not among them: the target gave that token itself.
        accepted_lookup: Those that prompt lookup made, behind a draft or without one.
        hits: Commits that stayed in the tree to their end.
        branch_hits: Those of them that left the most probable path: a branch saved the step after.
        misses: Commits that left the tree.
        blind_steps: Commits made while an earlier one was still pending, so that nothing could be predicted.
        received_nodes: Nodes that arrived, of use or not.
        added_nodes: Nodes that arrived in time to be live.
        late_drafts: Positions whose drafts arrived after they were committed.
        late_hits: Those of them whose draft was right: it confirmed what was pending.
        stale_nodes: Nodes dropped on arrival because what they hang below is gone.
        fallback_tokens: Tokens that prompt lookup added for want of drafts, those of steps included that withheld them.
        fallback_hits: Those of them that proved right.
        unpaid_steps: Steps whose drafts were withheld, or not looked at: they would cost more than they yield.
        waits: Steps held back for drafts about to arrive.
        wait_seconds: Time of those waits.
        opened_sessions: Sessions opened, again after a lost link included.
        rejected_sessions: Rejects received.
    """

    steps: int = 0
    committed_tokens: int = 0
    offered_tokens: int = 0
    offered_drafted: int = 0
    accepted_main_line: int = 0
    accepted_branch: int = 0
    accepted_lookup: int = 0
    hits: int = 0
    branch_hits: int = 0
    misses: int = 0
    blind_steps: int = 0
    received_nodes: int = 0
    added_nodes: int = 0
    late_drafts: int = 0
    late_hits: int = 0
    stale_nodes: int = 0
    fallback_tokens: int = 0
    fallback_hits: int = 0
    unpaid_steps: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    opened_sessions: int = 0
    rejected_sessions: int = 0

    def took(self, draft: Draft, count: int) -> None:
        """Count by who made them the first ``count`` tokens of a draft, or all where it has fewer."""
        drafted, branch = len(draft.drafted), draft.branch
        if count > drafted:
            self.accepted_lookup += min(count - drafted, len(draft.guess))
            count = drafted
        if branch:
            branch = min(count, branch)
            self.accepted_branch += branch
            count -= branch
        self.accepted_main_line += count

    def items(self) -> list[tuple[str, float]]:
        """Names and values."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass(slots=True)
class Shared:
    """What all sessions of a controller learn together, and the target's vocabulary: ids are below ``vocab_size``."""

    counters: Counters = field(default_factory=Counters)
    calibration: Calibration = field(default_factory=Calibration)
    times: StepTimes = field(default_factory=StepTimes)
    cost: StepCost = field(default_factory=lambda: StepCost(1.0, 1.0, 0.0))
    lookup: LookupRates = field(default_factory=LookupRates)
    vocab_size: int = ALL_IDS
