"""Contexts of broken connections: for whom, how many, for how long; and a session that goes on with one."""

import pytest
from host_peer import PROMPT, TOY, Peer, with_peer
from toys import FINGERPRINT, draft_model, limits

from vllm_wanspec.core.messages import Close, Commit, Have, Hello, Nodes, Open, Resumed
from vllm_wanspec.drafter.kept import KEPT_S, KeptContexts


def test_a_context_is_given_back_once_and_to_no_other() -> None:
    kept = KeptContexts()
    kept.keep("a", 1, (5, 6, 7), 0.0)
    assert list(kept.take("b", 1, 1.0)) == list(kept.take("a", 2, 1.0)) == []
    assert list(kept.take("a", 1, 1.0)) == [5, 6, 7]
    assert list(kept.take("a", 1, 1.0)) == []


def test_it_is_kept_for_a_while() -> None:
    kept = KeptContexts()
    for number in (1, 2):
        kept.keep("a", number, (5,), float(number))
    assert list(kept.take("a", 1, 1.0 + KEPT_S)) == [5]
    assert list(kept.take("a", 2, 2.1 + KEPT_S)) == []
    assert len(kept) == 0


@pytest.mark.parametrize("lengths", [[6, 5], [3, 3, 3, 3], [11], [10, 10]])
def test_the_oldest_make_room(lengths: list[int]) -> None:
    kept = KeptContexts(most_tokens=10)
    for number, length in enumerate(lengths):
        kept.keep("a", number, (5,) * length, 0.0)
        assert sum(len(context) for _, context in kept._contexts.values()) == kept._tokens <= 10
    last = len(lengths) - 1
    assert bool(kept.take("a", last, 0.0)) is (lengths[last] <= 10)


@pytest.mark.parametrize(("client", "context"), [("", (1, 2)), ("a", ())])
def test_what_nobody_could_ask_for_is_not_kept(client: str, context: tuple[int, ...]) -> None:
    kept = KeptContexts()
    kept.keep(client, 1, context, 0.0)
    assert len(kept) == 0


def test_a_session_goes_on_with_what_its_broken_connection_had() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(Open(1, PROMPT, limits(8, 64)), Open(2, PROMPT, limits(8, 64)))
        await peer.say(Commit(1, len(PROMPT), tuple(TOY.drafted(PROMPT, 2))))
        await peer.say(Close(2))
        await peer.end()
        assert len(peer.host.kept) == 1  # a session that was closed is over
        context = (*PROMPT, *TOY.drafted(PROMPT, 4))
        again = Peer(host=peer.host)
        assert await again.say(Hello(1, FINGERPRINT, "other"))
        await again.say(Open(7, (), limits(8, 64), len(context), resumes=Resumed("test", 1)))
        await again.until(lambda: Have(7, len(PROMPT) + 2) in again.received)
        assert not again.tokens(7)  # the context is not whole
        await again.say(Commit(7, len(PROMPT) + 2, context[len(PROMPT) + 2 :]))
        await again.until(lambda: len(again.tokens(7)) >= 3)
        assert again.tokens(7)[:3] == TOY.drafted(context, 3)
        [first, *_] = [message for message in again.received if isinstance(message, Nodes)]
        assert (first.seen, first.nodes[0].id, first.nodes[0].parent) == (len(context), 1, 0)
        await again.end()

    with_peer(scenario)


def test_one_of_which_nothing_is_known_sends_everything() -> None:
    async def scenario(peer: Peer) -> None:
        await peer.greet()
        await peer.say(Open(1, (), limits(8, 64), len(PROMPT), resumes=Resumed("somebody", 1)))
        await peer.until(lambda: Have(1, 0) in peer.received)
        await peer.say(Commit(1, 0, PROMPT))
        await peer.until(lambda: len(peer.tokens(1)) >= 3)
        assert peer.tokens(1)[:3] == TOY.drafted(PROMPT, 3)

    with_peer(scenario, model=draft_model())
