"""The drafter's server with certificates of its own and of its clients, as ``--ssl-…`` flags have vLLM's listen."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from certificates import Authority
from test_routes import drafter, hello

from vllm_wanspec.config import TOKEN_ENV
from vllm_wanspec.config.tls import TlsFiles, client_context
from vllm_wanspec.core.messages import Welcome


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The flags of mutual TLS, as uvicorn takes them from vLLM; the client's files are client.pem and client.key."""
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    server, clients = Authority(tmp_path, "server-ca"), Authority(tmp_path, "clients-ca")
    shown = server.issue("server")
    clients.issue("client")
    return {
        "ssl_certfile": str(shown.certificate),
        "ssl_keyfile": str(shown.key),
        "ssl_ca_certs": str(clients.file),
        "ssl_cert_reqs": int(ssl.CERT_REQUIRED),
    }


def connect(flags: dict[str, Any], **files: Path) -> object:
    """What a client with these files is answered."""

    async def scenario() -> object:
        context = client_context(TlsFiles(**{key: str(path) for key, path in files.items()}))
        async with drafter(**flags) as (url, _), aiohttp.ClientSession() as http:
            async with http.ws_connect(url.replace("127.0.0.1", "localhost"), ssl=context) as peer:
                return await hello(peer)

    return asyncio.run(scenario())


def test_a_client_with_a_certificate_is_welcome(flags: dict[str, Any], tmp_path: Path) -> None:
    files = {"certificate": tmp_path / "client.pem", "key": tmp_path / "client.key"}
    assert isinstance(connect(flags, ca=tmp_path / "server-ca.pem", **files), Welcome)


def test_one_without_is_not(flags: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(aiohttp.ClientConnectionError):
        connect(flags, ca=tmp_path / "server-ca.pem")
