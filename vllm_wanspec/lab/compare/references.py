"""The prompts: what the target makes of each alone, how long that takes, and how well the draft model foresees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.plan import Options
from vllm_wanspec.lab.harness.client import Completion, CompletionClient
from vllm_wanspec.lab.harness.models import MIN_CUT, Prompt, repeat_cut
from vllm_wanspec.lab.harness.view import NOBODY, Onlooker
from vllm_wanspec.lab.records import Journal, Records, Reference, Request


def is_usable(reference: Reference, options: Options) -> bool:
    """Whether there is enough of a text."""
    return options.whole_texts or len(reference.expected) >= MIN_CUT


def usable(records: Records, options: Options) -> list[Reference]:
    """Return the prompts that are measured, in order: as many as wanted, once they have been taken."""
    taken = [reference for _, reference in sorted(records.references.items())]
    return [reference for reference in taken if is_usable(reference, options)][: options.count]


def as_request(reference: Reference, done: Completion) -> Request:
    """Return the record of an answer, to a tenth of a millisecond."""
    return Request(reference.index, tuple((round(at_ms, 1), count) for at_ms, count in done.pieces))


async def take_reference(
    plain: CompletionClient, index: int, prompt: Prompt, options: Options, onlooker: Onlooker = NOBODY
) -> tuple[Reference, Request]:
    """Ask the target whose texts count for its own text; without ranks.

    Raises:
        ClientError: The request failed.
    """
    onlooker.begin(prompt)
    done = await plain.complete(prompt.text, options.max_tokens, on_text=onlooker.stream)
    onlooker.end(done)
    count = len(done.token_ids)
    cut = count if options.whole_texts else repeat_cut(done.token_ids, options.repeat_span)
    text = (prompt.module, prompt.text, done.prompt_ids, done.token_ids[:cut], (None,) * cut)
    reference = Reference(index, *text, generated=count, time_ms=done.time_ms(cut), kind=prompt.kind)
    return reference, as_request(reference, done)


async def take_references(
    journal: Journal,
    options: Options,
    prompts: Sequence[Prompt],
    plain: CompletionClient,
    draft: CompletionClient | None,
) -> None:
    """Fill the journal with as many usable prompts as wanted, and those between them that are not.

    Args:
        journal: Where they are kept; it is not asked again for what it has.
        options: The run's settings.
        prompts: Candidates, in order.
        plain: The target whose texts count.
        draft: The draft model; None leaves ranks open.

    Raises:
        ConfigError: There are not enough prompts whose texts are long enough.
        ClientError: A request failed.
    """
    wanted = options.count or 1
    for index, prompt in enumerate(prompts):
        if options.count is not None and len(usable(journal, options)) >= wanted:
            return
        if index in journal.references:
            continue
        reference, _ = await take_reference(plain, index, prompt, options)
        if draft is not None and is_usable(reference, options):
            reference = replace(reference, ranks=await draft.ranks(reference.prompt_ids, reference.expected))
        journal.add(reference)
    found = len(usable(journal, options))
    if found < wanted:
        problem = f"only {found} of {len(prompts)} prompts have {MIN_CUT} tokens before the text ends or repeats itself"
        if options.count is None:
            raise ConfigError(f"{problem}: nothing to measure")
        raise ConfigError(f"--count: {problem}, and {wanted} are wanted: give more prompts, or a smaller --count")
