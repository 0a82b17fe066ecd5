"""The completion client, against a real HTTP server that answers like vLLM, or badly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from vllm_wanspec.lab.harness.client import ClientError, Completion, CompletionClient, first_difference, read_ranks

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Use = Callable[[CompletionClient], Awaitable[Any]]


def with_server(handler: Handler, use: Use, timeout_s: float = 20.0, clock: Callable[[], float] | None = None) -> Any:
    """Serve ``/v1/completions`` by a handler while a client is used; return what the use returns."""

    async def run() -> Any:
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        more = {} if clock is None else {"clock": clock}
        try:
            async with aiohttp.ClientSession() as http:
                return await use(CompletionClient(http, f"http://{host}:{port}/", "model", timeout_s, **more))
        finally:
            await runner.cleanup()

    return asyncio.run(asyncio.wait_for(run(), 60))


def chunk(text: str, ids: list[int], **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "token_ids": ids, **more}]})


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def streaming(*pieces: bytes, done: bool = True, requests: list[Any] | None = None) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        if requests is not None:
            requests.append(await request.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if done:
            await response.write(b"data: [DONE]\n\n")
        return response

    return handler


def answering(content: Any, status: int = 200, requests: list[Any] | None = None) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        if requests is not None:
            requests.append(await request.json())
        return web.json_response(content, status=status)

    return handler


def completion(token_ids: list[int], ttft_ms: float = 10.0, last_ms: float = 100.0) -> Completion:
    return Completion((1, 2), tuple(token_ids), "", ttft_ms, last_ms, "length")


def complete(client: CompletionClient) -> Awaitable[Completion]:
    return client.complete("def f", 8)


def test_tokens_are_gathered_and_timed() -> None:
    requests: list[Any] = []
    seen: list[tuple[str, int]] = []
    ticks_s = iter([5.0, 5.040, 5.060, 5.100, 5.101, 5.102])
    handler = streaming(
        chunk("(x", [10], prompt_token_ids=[1, 2]),
        chunk("):", [11]),
        chunk(" pass", [12, 13, 14]),
        chunk("", [], finish_reason="stop"),
        event({"choices": [], "usage": {}}),
        requests=requests,
    )
    done = with_server(
        handler,
        lambda client: client.complete(
            "def f", 8, ignore_eos=True, extra={"seed": 1}, on_text=lambda *piece: seen.append(piece)
        ),
        clock=lambda: next(ticks_s),
    )
    assert done.prompt_ids == (1, 2)
    assert done.token_ids == (10, 11, 12, 13, 14)
    assert done.text == "(x): pass"
    assert done.finish_reason == "stop"
    assert seen == [("(x", 1), ("):", 1), (" pass", 3)]
    assert done.ttft_ms == pytest.approx(40.0)
    assert done.tpot_ms == pytest.approx(60.0 / 4)
    assert requests[0] == {
        "model": "model",
        "prompt": "def f",
        "max_tokens": 8,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "seed": 1,
    }


def test_one_token_has_no_time_per_token() -> None:
    assert completion([7]).tpot_ms is None


def test_token_ids_can_be_sent_and_events_may_come_in_any_pieces() -> None:
    requests: list[Any] = []
    long_prompt = list(range(50_000))
    whole = chunk("é", [10], prompt_token_ids=long_prompt) + chunk("b", [11])
    pieces = [whole[i : i + 4_001] for i in range(0, len(whole), 4_001)]
    done = with_server(streaming(*pieces, requests=requests), lambda client: client.complete([3, 4], 2))
    assert requests[0]["prompt"] == [3, 4]
    assert len(done.prompt_ids) == 50_000
    assert done.text == "éb"


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (answering({"error": {"message": "no such model"}}, status=404), "answered 404: no such model"),
        (answering({"detail": "x"}, status=500), "answered 500"),
        (streaming(event({"error": {"message": "engine dead"}})), "engine dead"),
        (streaming(chunk("a", [1], prompt_token_ids=[1]), done=False), "broke off"),
        (streaming(b"data: {not json\n\n"), "not JSON"),
        (streaming(b"data: [1]\n\n"), "not an object"),
        (streaming(event({"choices": [{"text": "a"}]})), "no token ids"),
        (streaming(), "no token ids"),
    ],
)
def test_bad_answers_are_client_errors_that_name_the_server(handler: Handler, reason: str) -> None:
    with pytest.raises(ClientError) as caught:
        with_server(handler, complete)
    assert reason in str(caught.value)
    assert "http://127.0.0.1:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stalled_answer_times_out() -> None:
    async def stall(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    with pytest.raises(ClientError, match=r"within 0\.2 s"):
        with_server(stall, complete, timeout_s=0.2)


def test_a_closed_port_is_a_client_error() -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as http:
            await CompletionClient(http, "http://127.0.0.1:1", "model").complete("x", 2)

    with pytest.raises(ClientError, match=r"127\.0\.0\.1:1"):
        asyncio.run(run())


def logprobs(values: dict[int, float]) -> dict[str, Any]:
    top = {f"token_id:{token}": value for token, value in values.items()}
    return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


def test_log_probabilities_are_those_of_the_one_token_after_a_context() -> None:
    requests: list[Any] = []
    handler = answering(logprobs({5: -0.5, 6: -1.5}), requests=requests)
    found = with_server(handler, lambda client: client.next_logprobs([1, 2, 3]))
    assert found == {5: -0.5, 6: -1.5}
    assert requests[0]["prompt"] == [1, 2, 3]
    assert requests[0]["max_tokens"] == 1
    assert not requests[0].get("stream")


@pytest.mark.parametrize(
    ("values", "tie"),
    [
        ({5: -0.7, 6: -0.7005}, True),
        ({5: -0.7, 6: -0.702}, False),
        ({5: -0.7}, False),
        ({}, False),
    ],
)
def test_a_tie_is_two_tokens_within_a_thousandth_of_a_nat(values: dict[int, float], tie: bool) -> None:
    requests: list[Any] = []
    handler = answering(logprobs(values), requests=requests)
    found = with_server(handler, lambda client: client.is_tie([1, 2], [4, 5, 8], [4, 6], 1))
    assert found is tie
    assert requests[0]["prompt"] == [1, 2, 4]


def test_ending_early_is_no_tie() -> None:
    handler = answering({}, status=500)  # not even asked
    assert with_server(handler, lambda client: client.is_tie([1, 2], [4], [4, 6], 1)) is False


def test_an_answer_without_logprobs_is_a_client_error() -> None:
    with pytest.raises(ClientError, match="no log-probabilities"):
        with_server(answering({"choices": [{"logprobs": None}]}), lambda client: client.next_logprobs([1]))


@pytest.mark.parametrize(
    ("left", "right", "position"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([2], [1], 0)],
)
def test_the_first_difference_is_found(left: list[int], right: list[int], position: int | None) -> None:
    assert first_difference(left, right) == position


def test_ranks_are_counted_from_0_among_eight() -> None:
    entries = [
        {"5": {"logprob": -0.1, "rank": 1}},
        {"9": {"logprob": -4.0, "rank": 8}, "5": {"logprob": -0.1, "rank": 1}},
        {"7": {"logprob": -9.0, "rank": 9}, "5": {"logprob": -0.1, "rank": 1}},
    ]
    assert read_ranks(entries, [5, 9, 7]) == (0, 7, None)


def test_the_time_of_a_part_of_the_text_counts_from_the_first_token() -> None:
    pieces = ((5.0, 2), (45.0, 1), (85.0, 3))
    done = Completion((1,), (1, 2, 3, 4, 5, 6), "", 5.0, 85.0, None, pieces)
    assert [done.time_ms(tokens) for tokens in (0, 1, 2, 3, 4, 6, 9)] == [0.0, 0.0, 0.0, 40.0, 80.0, 80.0, 80.0]
