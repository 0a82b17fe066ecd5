"""What a Draft is made of, and that whoever is handed its tokens cannot change it."""

from vllm_wanspec.core.draft import NO_DRAFT, Draft


def test_a_guess_follows_what_was_drafted() -> None:
    assert Draft([1, 2], 1.5, 0.5, (3,), 2).tokens == [1, 2, 3]
    assert NO_DRAFT.tokens == []


def test_vllm_may_shorten_the_list_that_it_gets() -> None:
    for draft in (Draft([1, 2], 1.5, 0.5), Draft([], 0.5, 1.0, (1, 2), 3), NO_DRAFT):
        drafted = list(draft.drafted)
        draft.tokens.clear()
        assert draft.drafted == drafted
