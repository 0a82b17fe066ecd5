"""What a request's body says of its drafts, through the real server: off, understood, or HTTP 400."""

import asyncio
from typing import Any

import aiohttp
import pytest

from .fleet import MODEL_NAME, Target
from .scrape import is_up, until, wanspec_page

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

WRONG = ("of", "", 7, [], ["off", "on"], "max_branches=0", "branches=1", "x" * 2000)
OFF = (False, 0, "Off", " off ", "no", "none", "disabled", ["off"])


async def complete(http: aiohttp.ClientSession, target: Target, **more: Any) -> tuple[int, dict[str, Any]]:
    """Status and body of one completion."""
    body = {"model": MODEL_NAME, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, **more}
    async with http.post(target.url + "/v1/completions", json=body) as response:
        return response.status, await response.json()


async def sessions(http: aiohttp.ClientSession, target: Target) -> float:
    return (await wanspec_page(http, target)).get("wanspec_opened_sessions_total")


def test_what_is_not_understood_is_http_400_and_off_is_off(wanspec: Target) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, wanspec, "main"), "the drafter serves the target")
            before = await sessions(http, wanspec)
            for value in WRONG:
                status, body = await complete(http, wanspec, vllm_xargs={"wanspec": value})
                assert status == 400, (value, body)
                assert body["error"]["message"].startswith("vllm_xargs: wanspec: "), body
            status, body = await complete(http, wanspec, vllm_xargs={"WanSpec": "off"})
            assert status == 400
            assert "it is spelled wanspec" in body["error"]["message"]
            texts = set()
            for value in OFF:
                status, body = await complete(http, wanspec, vllm_xargs={"wanspec": value})
                assert status == 200, (value, body)
                texts.add(body["choices"][0]["text"])
            for more in ({"max_tokens": 1}, {"max_tokens": 1, "echo": True, "logprobs": 1}, {"max_tokens": 2}):
                status, body = await complete(http, wanspec, **more)
                assert status == 200, (more, body)
            assert await sessions(http, wanspec) == before
            for value in (True, "on", "max_branches=1"):
                status, body = await complete(http, wanspec, vllm_xargs={"wanspec": value})
                assert status == 200, (value, body)
                texts.add(body["choices"][0]["text"])
            assert await sessions(http, wanspec) == before + 3
            assert len(texts) == 1

    asyncio.run(main())
