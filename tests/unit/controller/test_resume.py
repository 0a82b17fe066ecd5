"""A long context after a broken connection: it goes on at the drafter that has it, and crosses the WAN once."""

import pytest
from pools import TOY, peek, pool_of, up
from toys import DrafterServer, draft_model, wait_until

from vllm_wanspec.controller import link as link_module
from vllm_wanspec.drafter.kept import KeptContexts
from vllm_wanspec.sim.models import Language

LENGTH = 20_000


@pytest.mark.parametrize("remembered", [True, False])
def test_a_long_context_crosses_the_wan_once(monkeypatch: pytest.MonkeyPatch, remembered: bool) -> None:
    monkeypatch.setattr(link_module, "FIRST_BACKOFF_S", 0.01)
    language: Language = TOY
    prompt = [index % 50 for index in range(LENGTH)]
    with DrafterServer(language, model=draft_model(max_context=100_000)) as server, pool_of(server.url) as pool:
        wait_until(lambda: up(pool))
        [link] = pool.links
        pool.begin([], [("long", prompt), ("short", [1, 2, 3])])
        wait_until(lambda: peek(pool, "long") and peek(pool, "short"))
        first_bytes = link.sent_bytes
        assert first_bytes > 3 * LENGTH
        pool.step([("long", language.verify(prompt, [])), ("short", language.verify([1, 2, 3], []))])
        wait_until(lambda: peek(pool, "long"))
        server.stop()
        wait_until(lambda: not up(pool))
        if not remembered:
            server.host.kept = KeptContexts()
        server.start()
        wait_until(lambda: peek(pool, "long") and peek(pool, "short"))
        context = [*prompt, *language.verify(prompt, [])]
        assert peek(pool, "long", 3) == language.drafted(context, len(peek(pool, "long", 3)))
        again_bytes = link.sent_bytes - first_bytes
        assert again_bytes < 2_000 if remembered else again_bytes > 3 * LENGTH
        assert link.faults == 0
