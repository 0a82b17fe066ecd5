"""Wraps of vLLM's V1 model runner; see `vllm_wanspec.ledger`."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_wanspec.controller import engine
from vllm_wanspec.controller.cpu_mends import repair_empty_top_k
from vllm_wanspec.ledger import Wrap, attribute, need_attributes, need_methods, need_parameters, wrap

NO_DRAFTER_LIMIT = 2**31 - 1

LEDGER = (
    Wrap(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states",
        "propose() gets rows without request ids, and no word of requests that come and go.",
        "Class-wide wrap: tells the proposer of the step's scheduler output first, then calls the original.",
        "vLLM hands request ids and lifecycle to custom proposers.",
    ),
    Wrap(
        "GPUModelRunner.take_draft_token_ids (of one runner)",
        "Drafts that arrive after propose() would wait a whole step; here they are still in time, and waiting here "
        "does not hold back tokens already produced.",
        "Instance wrap: fills in the proposed lists in place, then calls the original.",
        "vLLM asks custom proposers for drafts when it schedules.",
    ),
    Wrap(
        "GPUModelRunner.effective_drafter_max_model_len (of one runner)",
        "A request that comes within K tokens of max_model_len would switch proposing off for the whole batch and "
        "have every request verify K zero tokens.",
        "Set very large: this proposer runs no model that could overflow, and the scheduler clamps near the end.",
        "vLLM skips that check for proposers without a model.",
    ),
)


def install_in_engine() -> None:
    """Check, and set the class-wide wraps of the model runner; called when the proposer is built.

    Raises:
        UnsupportedError: See `check`.
    """
    check()
    wrap(_runner(), "_update_states", _telling_the_proposer)
    engine.install()
    repair_empty_top_k()


def check() -> None:
    """Fail early where remote drafting cannot work.

    Raises:
        UnsupportedError: vLLM lacks what the wraps need.
    """
    runner = _runner()
    need_methods(runner, ("_update_states", "take_draft_token_ids", "propose_draft_token_ids"))
    need_parameters(runner, "_update_states", ("self", "scheduler_output"))
    need_attributes(runner, ("effective_drafter_max_model_len", "_draft_token_ids", "drafter"))


def attach(runner: Any, proposer: Any) -> None:
    """Set the wraps of one model runner; called once, before its first step."""
    runner.effective_drafter_max_model_len = NO_DRAFTER_LIMIT
    original = runner.take_draft_token_ids

    @functools.wraps(original)
    def take_draft_token_ids() -> Any:
        proposer.draft(runner._draft_token_ids)
        return original()

    runner.take_draft_token_ids = take_draft_token_ids


def _runner() -> Any:
    return attribute("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")


def _telling_the_proposer(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        begin_step = getattr(getattr(self, "drafter", None), "begin_step", None)
        if begin_step is not None:
            begin_step(self, scheduler_output)
        return original(self, scheduler_output)

    return _update_states
