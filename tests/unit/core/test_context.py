"""Context: like a list of the same tokens, whatever becomes of the list that its prompt was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_wanspec.core.context import Context

tokens = st.lists(st.integers(0, 9), max_size=6)
places = st.none() | st.integers(-14, 14)


@given(tokens, tokens, places, places)
def test_it_is_like_a_list(prompt: list[int], own: list[int], begin: int | None, end: int | None) -> None:
    context, plain = Context(prompt), prompt + own
    context.own.extend(own)
    prompt.append(77)  # whose list it was may add to it
    assert len(context) == len(plain)
    assert list(context) == plain
    assert context == plain
    assert context == tuple(plain)
    assert context[begin:end] == plain[begin:end]
    for index in range(-len(plain), len(plain)):
        assert context[index] == plain[index]
    for index in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError):
            context[index]


def test_what_it_is_not() -> None:
    context = Context([1, 2, 3])
    assert context != [1, 2]
    assert context != [1, 2, 4]
    assert context != 7
    with pytest.raises(ValueError, match="successive"):
        context[::2]
    with pytest.raises(TypeError):
        hash(context)
