"""The side-by-side bench's prompts: what the target makes of each alone, and how well the draft model foresees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_wanspec.errors import ConfigError
from vllm_wanspec.lab.compare.plan import BenchOptions
from vllm_wanspec.lab.harness.client import ClientError, Completion, CompletionClient
from vllm_wanspec.lab.harness.models import MIN_CUT, Prompt, repeat_cut
from vllm_wanspec.lab.records import Journal, Reference

__all__ = ["RANKS", "RankingClient", "as_completion", "read_ranks", "take_references", "usable"]

#: How many of the draft model's most probable tokens are looked at.
RANKS = 8


class RankingClient(CompletionClient):
    """Also asks where given tokens stand among a model's most probable ones."""

    async def ranks(self, prompt_ids: Sequence[int], following: Sequence[int]) -> tuple[int | None, ...]:
        """Return each following token's rank after what comes before it, from 0; None outside the best eight.

        Raises:
            ClientError: The request failed.
        """
        body = {
            "model": self._model,
            "prompt": [*prompt_ids, *following],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": RANKS,
        }
        answer = await self._answer(body)
        try:
            return read_ranks(answer["choices"][0]["prompt_logprobs"][len(prompt_ids) :], following)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ClientError(f"{self._url}: the answer has no ranks of the prompt's tokens") from error


def read_ranks(entries: Sequence[dict[str, Any]], tokens: Sequence[int]) -> tuple[int | None, ...]:
    """Return each token's rank, from 0, in vLLM's ``prompt_logprobs``; None outside the most probable ones."""
    ranks = [int(entry[str(token)]["rank"]) - 1 for entry, token in zip(entries, tokens, strict=True)]
    return tuple(rank if rank < RANKS else None for rank in ranks)


def as_completion(reference: Reference) -> Completion:
    """Return a reference's text as if the target had just given it."""
    return Completion(reference.prompt_ids, reference.expected, "", 0.0, 0.0, None)


def usable(journal: Journal, options: BenchOptions) -> list[Reference]:
    """Return the prompts that are measured, in order: as many as wanted, once they have been taken."""
    return [journal.references[index] for index in sorted(journal.references)][: options.prompt_count]


async def take_references(
    journal: Journal,
    options: BenchOptions,
    prompts: Sequence[Prompt],
    plain: CompletionClient,
    draft: RankingClient | None,
) -> None:
    """Fill the journal with as many usable prompts as wanted.

    Args:
        journal: Where they are kept; it is not asked again for what it has.
        options: The bench's settings.
        prompts: Candidates, in order.
        plain: The target whose texts count.
        draft: The draft model; None leaves ranks open.

    Raises:
        ConfigError: There are not enough prompts whose texts are long enough.
        ClientError: A request failed.
    """
    after = max(journal.references, default=-1)
    for index, prompt in enumerate(prompts):
        if len(journal.references) >= options.prompt_count:
            return
        if index <= after:
            continue
        done = await plain.complete(prompt.text, options.max_tokens)
        expected = done.token_ids[: repeat_cut(done.token_ids)]
        if len(expected) < MIN_CUT:
            continue
        ranks = tuple(None for _ in expected) if draft is None else await draft.ranks(done.prompt_ids, expected)
        journal.add(Reference(index, prompt.module, prompt.text, done.prompt_ids, expected, ranks))
    found, wanted = len(journal.references), options.prompt_count
    if found < wanted:
        problem = f"only {found} of {len(prompts)} prompts have {MIN_CUT} tokens before the text ends or repeats itself"
        raise ConfigError(f"--count: {problem}, and {wanted} are wanted: give more prompts, or a smaller --count")
