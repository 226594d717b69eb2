"""The product's own listener, for what aiohttp's test server does otherwise: who leaves, packed bodies, broken HTTP, a base URL."""

import contextlib
from typing import Any

from aiohttp.test_utils import BaseTestServer
from yarl import URL

import antigravity_proxy as agproxy


class OwnListener(BaseTestServer):
    def __init__(self, app: Any) -> None:
        super().__init__()
        self._app = app
        self._stack = contextlib.AsyncExitStack()

    async def start_server(self, **_: Any) -> None:
        if not self.started:
            self.host, self.port = "127.0.0.1", await agproxy.listen(self._app, "127.0.0.1", 0, self._stack)
            self._root = URL(f"http://127.0.0.1:{self.port}")

    @property
    def started(self) -> bool:
        return self._root is not None

    async def close(self) -> None:
        await self._stack.aclose()

    async def _make_runner(self, **_: Any) -> Any:
        raise NotImplementedError
