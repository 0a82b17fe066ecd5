"""The toy drafter with health and metrics pages, run as a process in place of `wanspec drafter`."""

import asyncio
import sys
from pathlib import Path

from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[1]))

from toys import DrafterServer, Toy, draft_model

from vllm_wanspec.core.messages import PATH


class Server(DrafterServer):
    """Serves on a given port, in this thread, for ever."""

    async def serve(self, port: int) -> None:
        app = web.Application()
        app.router.add_get(PATH, self._handle)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        host = self.host
        counters = {
            "wanspec_drafted_tokens_total": host.drafted_tokens,
            "wanspec_branches_started_total": host.branches_started,
            "wanspec_branch_seconds_total": host.branch_seconds,
        }
        return web.Response(text="".join(f"{name} {value}\n" for name, value in counters.items()))


if __name__ == "__main__":
    server = Server(Toy(), model=draft_model(max_context=1023), running_branches=int(sys.argv[2]))
    asyncio.run(server.serve(int(sys.argv[1])))
