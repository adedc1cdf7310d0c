"""Who may ask a replica for what. Named by `--middleware rlzoo.engines.guard.RequireKey`.

vLLM's own key guards what draws (`/v1`, `/inference`), but not `/collective_rpc` and the others
that its dev mode opens, which load weights and call any method of a worker.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = ("/health",)  # what a load balancer asks, and what tells nothing
Scope = dict[str, Any]


class RequireKey:
    """Lets a request through to any path only with VLLM_API_KEY as its bearer token; without that
    variable, only from this machine."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app, self.key = app, os.environ.get("VLLM_API_KEY") or None

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        guarded = scope["type"] in ("http", "websocket") and scope["path"] not in OPEN
        if not guarded or self.admits(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        word = "Unauthorized" if self.key else "Only from this machine: VLLM_API_KEY is not set."
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": word}).encode()})

    def admits(self, scope: Scope) -> bool:
        if self.key is None:
            client = scope.get("client")  # a Unix socket has none
            return client is None or ipaddress.ip_address(client[0]).is_loopback
        sent = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(sent, b"Bearer " + self.key.encode())
