"""Any message, for property tests: values as they are after the wire, so that they come back equal."""

import math

from hypothesis import strategies as st

from vllm_wanspec.core.messages import (
    MAX_BRANCHES,
    MAX_DEPTH,
    MAX_ID,
    MAX_RUNNING_BRANCHES,
    MAX_TEMPERATURE,
    MAX_TOKEN,
    REJECT_CODES,
    Close,
    Commit,
    Drain,
    Have,
    Hello,
    Limits,
    Nodes,
    Open,
    Ping,
    Pong,
    Refuse,
    Reject,
    Resumed,
    Want,
    Welcome,
)
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.wire import NATS

ids = st.integers(0, MAX_ID)
counts = st.integers(1, MAX_TOKEN + 1)
tokens = st.integers(0, MAX_TOKEN)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
versions = st.integers(0, 2**16)
loads = st.integers(0, 2**16)
levels = st.sampled_from(NATS)


@st.composite
def node_runs(draw: st.DrawFn) -> tuple[NodeRecord, ...]:
    """Nodes of successive ids, with near parents and far ones."""
    count = draw(st.integers(0, 10))
    first = draw(st.integers(1, MAX_ID - 10))
    return tuple(
        NodeRecord(
            number,
            draw(st.integers(0, number - 1) | st.integers(max(0, number - 300), number - 1)),
            draw(tokens),
            0.0 - draw(levels),
            draw(levels),
        )
        for number in range(first, first + count)
    )


session_limits = st.builds(
    Limits,
    counts,
    counts,
    st.integers(1, MAX_BRANCHES),
    st.integers(1, MAX_RUNNING_BRANCHES),
    st.integers(1, MAX_DEPTH),
    st.none() | st.floats(0.0, 1e300) | st.just(math.inf),
    st.floats(0.0, 1.0),
    st.integers(1, MAX_BRANCHES),
)
contexts = st.lists(tokens, min_size=1, max_size=30).map(tuple)
whole = st.builds(
    lambda session, context, limits, temperature, priority, on_demand: Open(
        session, context, limits, len(context), temperature, priority, on_demand=on_demand
    ),
    ids,
    contexts,
    session_limits,
    st.floats(0.0, MAX_TEMPERATURE),
    st.integers(-(2**31), 2**31),
    st.booleans(),
)
resumed = st.builds(
    lambda session, limits, length, client, number: Open(session, (), limits, length, resumes=Resumed(client, number)),
    ids,
    session_limits,
    st.integers(1, 1000),
    texts,
    ids,
)

whole_digests = st.binary(max_size=4).map(lambda part: part * 8)

BY_TYPE: dict[type, st.SearchStrategy] = {
    Hello: st.builds(
        Hello,
        versions,
        texts,
        texts,
        st.binary(max_size=4).map(lambda b: b * 8),
        st.lists(tokens, max_size=5).map(tuple),
    ),
    Welcome: st.builds(Welcome, versions, texts, counts, texts, counts, counts, counts, loads),
    Refuse: st.builds(
        Refuse, texts, texts, tokens, st.lists(st.none() | st.binary(max_size=48), max_size=4).map(tuple)
    ),
    Open: whole | resumed,
    Commit: st.builds(Commit, ids, ids, st.lists(tokens, min_size=1, max_size=10).map(tuple)),
    Nodes: st.builds(Nodes, ids, ids, node_runs()),
    Close: st.builds(Close, ids),
    Reject: st.builds(Reject, ids, st.sampled_from(sorted(REJECT_CODES))),
    Ping: st.builds(Ping, ids),
    Pong: st.builds(Pong, ids, loads),
    Drain: st.just(Drain()),
    Have: st.builds(Have, ids, ids),
    Want: st.builds(Want, ids, counts),
}
any_message = st.one_of(*BY_TYPE.values())
