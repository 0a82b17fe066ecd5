"""Context: a request's committed tokens, without a copy of its prompt, which can be very long."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import overload


class Context(Sequence[int]):
    """The prompt, which is whoever's it was and of which only the first ``prompt_length`` tokens are read, and ``own``.

    Attributes:
        prompt_length: Tokens of the prompt.
        own: What came after it. Whoever serves the target may extend it.
    """

    __slots__ = ("_prompt", "own", "prompt_length")

    def __init__(self, prompt: Sequence[int]) -> None:
        """Begin with a prompt, whose tokens must not change from now on; more may be added to it."""
        self._prompt = prompt
        self.prompt_length = len(prompt)
        self.own: list[int] = []

    def __len__(self) -> int:
        """Tokens in it."""
        return self.prompt_length + len(self.own)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """One token, or a list of successive ones."""
        prompt_length = self.prompt_length
        if not isinstance(index, slice):
            place = range(len(self))[index]
            return self._prompt[place] if place < prompt_length else self.own[place - prompt_length]
        begin, end, step = index.indices(len(self))
        if step != 1:
            raise ValueError("only successive tokens can be taken from a context")
        if begin >= prompt_length:
            return self.own[begin - prompt_length : end - prompt_length]
        tokens = list(self._prompt[begin : min(end, prompt_length)])
        return tokens + self.own[: end - prompt_length] if end > prompt_length else tokens

    def __iter__(self) -> Iterator[int]:
        """All tokens in order."""
        return chain(islice(self._prompt, self.prompt_length), self.own)

    def __eq__(self, other: object) -> bool:
        """Whether another sequence has the same tokens."""
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it grows
