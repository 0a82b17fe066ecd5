"""Clients that are not ours: the stock benchmark at the target, and whoever calls at the drafter."""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest

from vllm_wanspec.core.messages import PATH, PROTOCOL_VERSION, Hello, Refuse
from vllm_wanspec.core.wire import decode, encode
from vllm_wanspec.lab.harness import machine
from vllm_wanspec.lab.harness.models import DemoModels

from .fleet import MODEL_NAME, TOKEN, Drafter, Target, vllm_command
from .programs import Program
from .scrape import drafts_decide, is_up, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BENCH_REQUESTS = 50
BENCH_TOKENS = 48
BENCH_DEADLINE_S = 400.0


def test_vllm_bench_serve_completes(
    wanspec: Target, models: DemoModels, prompt_texts: list[str], tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    texts = [prompt_texts[index % len(prompt_texts)] for index in range(BENCH_REQUESTS)]
    lines = [json.dumps({"prompt": text}) for text in texts]
    data.write_text("\n".join(lines), "utf-8")
    argv = vllm_command("bench", "serve", "--backend", "openai", "--base-url", wanspec.url, "--model", MODEL_NAME)
    argv += ["--tokenizer", str(models.target), "--dataset-path", str(data), "--result-dir", str(tmp_path)]
    argv += ["--dataset-name", "custom", "--skip-chat-template", "--save-result", "--result-filename", "result.json"]
    argv += f"--num-prompts {BENCH_REQUESTS} --custom-output-len {BENCH_TOKENS} --max-concurrency 8".split()
    argv += ["--ignore-eos", "--temperature", "0", "--disable-tqdm"]

    async def main() -> None:
        async with aiohttp.ClientSession() as http:
            await until(lambda: is_up(http, wanspec, "main"), "the drafter serves the target")
            async with drafts_decide(http, wanspec):
                program = Program("bench", argv, machine.server_env(), tmp_path, machine.pin_cores()[1])
                ended = await asyncio.to_thread(program.end, BENCH_DEADLINE_S)
        assert ended.code == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
        print(ended.stdout[-2500:])

    asyncio.run(main())
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert (result["completed"], result["failed"]) == (BENCH_REQUESTS, 0)
    assert result["total_output_tokens"] == BENCH_REQUESTS * BENCH_TOKENS


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {TOKEN}"])
def test_the_drafter_answers_401_without_the_token(drafter: Drafter, header: str | None) -> None:
    """Although the drafter was started without vLLM's ``--api-key``, which would not guard this path anyway."""

    async def main() -> int:
        headers = {"Authorization": header} if header else {}
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                await http.ws_connect(drafter.url + PATH, headers=headers)
        return refusal.value.status

    assert asyncio.run(main()) == 401


def test_the_drafter_talks_to_who_has_the_token(drafter: Drafter) -> None:
    async def main() -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession() as http, http.ws_connect(drafter.url + PATH, headers=headers) as socket:
            await socket.send_bytes(encode([Hello(PROTOCOL_VERSION, "another vocabulary", "test")]))
            frame = await socket.receive(10.0)
            (answer,) = decode(frame.data)
            assert isinstance(answer, Refuse) and answer.code == "vocabulary"

    asyncio.run(main())
