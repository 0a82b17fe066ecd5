"""What recording sessions tell their sink; playing a log again is tested in test_replay."""

import json

import pytest
from msgspec.structs import replace
from toys import VOCAB_SIZE, limits, toy

from vllm_wanspec.core.controller import ControllerSession
from vllm_wanspec.core.counters import Shared
from vllm_wanspec.core.drafter import DrafterSession, StartBranch, StopBranch
from vllm_wanspec.core.events import (
    LOG_VERSION,
    Record,
    RecordedControllerSession,
    RecordedDrafterSession,
    action_to_log,
    header,
)
from vllm_wanspec.core.messages import Commit, Nodes, Open, Reject, from_plain, to_plain
from vllm_wanspec.core.policy.length import Window
from vllm_wanspec.core.tree import NodeRecord
from vllm_wanspec.core.turnaround import Turnaround
from vllm_wanspec.errors import RemoteProtocolError

TOY = toy(seed=2)
PROMPT = (1, 2, 3)
OPENED = Open(4, PROMPT, limits(8, 64, max_branches=3, running_branches=4))
NODES = Nodes(4, 3, (NodeRecord(1, 0, 7, -0.5, 1.0), NodeRecord(2, 1, 8, -0.25, 0.5)))


def test_a_header_says_whose_log_it_is() -> None:
    assert header("drafter", "eu", wall_s=1e9, at_s=5.0) == {
        "wanspec_events": LOG_VERSION,
        "side": "drafter",
        "name": "eu",
        "wall_s": 1e9,
        "at_s": 5.0,
    }


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (StartBranch(3, 7, (1,) * 900, 890, (2,) * 10, 256), ["start", 3, 7, 900, 256]),
        (StopBranch(3), ["stop", 3]),
        (NODES, to_plain(NODES)),
        (Reject(4, "gap"), to_plain(Reject(4, "gap"))),
    ],
)
def test_actions_as_plain_data(action: StartBranch | StopBranch | Nodes | Reject, expected: list) -> None:
    assert action_to_log(action) == expected
    json.dumps(action_to_log(action))


def play_controller(session: ControllerSession) -> list:
    opened = session.open(4, OPENED.limits, 1.0, vocab_size=VOCAB_SIZE, turnaround=Turnaround())
    session.receive(NODES, 2.0)
    results = [opened, session.draft(4, 0.1, 3.0), session.commit([7, 9], 4.0), session.draft(4, 0.0, 5.0)]
    session.link_lost(6.0)
    return [*results, session.commit([1], 7.0), session.close(8.0)]


def test_a_controller_s_session_that_records_does_what_others_do() -> None:
    records: list[Record] = []
    recorded = RecordedControllerSession(PROMPT, Shared(), Window(), key="r1", sink=records.append, now=0.5)
    plain = ControllerSession(PROMPT, Shared(), Window())
    assert play_controller(recorded) == play_controller(plain)
    assert json.loads(json.dumps(records)) == json.loads(json.dumps(records, allow_nan=False))
    assert [(r["t"], r["k"], r["call"]) for r in records] == [
        (0.5, "r1", "begin"),
        (1.0, "r1", "open"),
        (2.0, "r1", "receive"),
        (3.0, "r1", "draft"),
        (4.0, "r1", "commit"),
        (5.0, "r1", "draft"),
        (6.0, "r1", "link_lost"),
        (7.0, "r1", "commit"),
        (8.0, "r1", "close"),
    ]
    begin, opened, received, draft, commit, blind, *_ = json.loads(json.dumps(records))
    assert (begin["context"], begin["windowed"]) == (list(PROMPT), True)
    assert from_plain(opened["out"][0]) == replace(OPENED, length=len(PROMPT))
    assert from_plain(received["message"]) == NODES
    assert (draft["limit"], draft["least"], draft["out"]) == (4, 0.1, [7, 8])
    assert (commit["tokens"], from_plain(commit["out"][0])) == ([7, 9], Commit(4, 3, (7, 9)))
    assert blind["out"] == []


def test_a_lookup_is_recorded_with_all_of_the_draft_that_it_makes() -> None:
    records: list[Record] = []
    session = RecordedControllerSession([1, 2, 3, 4, 1, 2, 3], Shared(), key="r", sink=records.append, now=0.0)
    draft = session.fall_back(session.draft(2, 0.0, 1.0), 2, 0.25, 1.0)
    session.commit([4, 1], 2.0, draft)
    assert records[1:] == [
        {"t": 1.0, "k": "r", "call": "draft", "limit": 2, "least": 0.0, "out": []},
        {"t": 1.0, "k": "r", "call": "fall_back", "limit": 2, "least": 0.25, "out": [4, 1]},
        {"t": 2.0, "k": "r", "call": "commit", "tokens": [4, 1], "out": []},
    ]


def test_what_a_bad_peer_sent_is_in_the_log() -> None:
    records: list[Record] = []
    session = RecordedControllerSession(PROMPT, Shared(), key="r", sink=records.append, now=0.0)
    session.open(4, OPENED.limits, 0.0, vocab_size=5, turnaround=Turnaround())
    with pytest.raises(RemoteProtocolError):
        session.receive(NODES, 1.0)
    assert records[-1]["message"] == to_plain(NODES)


def test_notes_are_no_calls_of_the_session() -> None:
    records: list[Record] = []
    session = RecordedControllerSession(PROMPT, Shared(), key="r", sink=records.append, now=0.0)
    session.note("wait", 1.5, waited_s=0.004)
    assert records[-1] == {"t": 1.5, "k": "r", "call": "wait", "waited_s": 0.004}


def play_drafter(session: DrafterSession) -> list:
    [start] = session.start(1.0)
    assert isinstance(start, StartBranch)
    context, actions = list(start.tokens), [[start]]
    for index in range(3):
        step = TOY.step(context)
        context.append(step.token)
        actions.append(session.drafted(1, [step], 2.0 + index))
    actions.append(session.committed(Commit(4, 3, (context[3],)), 5.0))
    actions.append(session.resize(1, 6.0))
    actions.append(session.ended(1, 7.0))
    return [*actions, session.close(8.0)]


def test_a_drafter_s_session_that_records_does_what_others_do() -> None:
    records: list[Record] = []
    settings = {"vocab_size": VOCAB_SIZE, "max_context": 100, "width": 2}
    recorded = RecordedDrafterSession(OPENED, key="c#4", sink=records.append, **settings)
    actions = play_drafter(recorded)
    assert actions == play_drafter(DrafterSession(OPENED, **settings))
    assert [(r["t"], r["call"]) for r in records] == [
        (1.0, "open"),
        (2.0, "drafted"),
        (3.0, "drafted"),
        (4.0, "drafted"),
        (5.0, "commit"),
        (6.0, "resize"),
        (7.0, "ended"),
        (8.0, "close"),
    ]
    opened, drafted, *_ = json.loads(json.dumps(records))
    assert from_plain(opened["message"]) == OPENED
    assert opened["settings"] == settings
    assert drafted["steps"][0][:3] == [TOY.step(PROMPT).token, TOY.step(PROMPT).logprob, TOY.step(PROMPT).entropy_nats]
    assert [r["out"] for r in records] == [[action_to_log(action) for action in each] for each in actions]


def test_a_failure_is_recorded_with_the_reject_that_follows() -> None:
    records: list[Record] = []
    session = RecordedDrafterSession(OPENED, key="c#4", sink=records.append, vocab_size=VOCAB_SIZE, max_context=100)
    session.start(0.0)
    session.failed(1.0)
    assert records[-1] == {"t": 1.0, "k": "c#4", "call": "failed", "out": [["stop", 1], to_plain(Reject(4, "engine"))]}
