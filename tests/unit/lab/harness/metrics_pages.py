"""Serving metrics pages to what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web


@asynccontextmanager
async def served(pages: Mapping[str, Any]) -> Any:
    """Serve what the pages give, by path."""

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=pages[request.path]())

    app = web.Application()
    app.add_routes([web.get(path, page) for path in pages])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as http:
        yield http, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()
