"""Turns away who may not ask, before anything is read of what they send."""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from policy_split_jax.access import host_name, same_token
from policy_split_jax.serving.errors import ApiError, answer_error

_OPEN_PATH = "/health"
"""Answered without a token: what watches over servers knows none."""


class Guard:
    """An ASGI application in front of another.

    With a token it wants `Authorization: Bearer TOKEN`. Without one it is on this machine, where pages in a browser
    could ask too: those that let a name of their own point here (DNS rebinding) by the Host header, and those of other
    origins by the Origin header.
    """

    def __init__(self, app: ASGIApp, token: str | None, names: Collection[str]):
        """`names` are the host names under which a server without a token is asked."""
        self._app, self._token, self._names = app, token, frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (error := self._refusal(scope["path"], Headers(scope=scope))):
            app = answer_error(scope, error)
        await app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._token is not None:
            return None if path == _OPEN_PATH else _refuse_stranger(headers.get("authorization", ""), self._token)
        if host_name(headers.get("host", "")) not in self._names:
            return ApiError("unknown host name", 403)
        if "origin" in headers and _origin_name(headers["origin"]) not in self._names:
            return ApiError("pages of other origins may not ask", 403)
        return None


def _refuse_stranger(authorization: str, token: str) -> ApiError | None:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer" and same_token(given.strip(), token):
        return None
    return ApiError(
        "this server wants its token as the API key (Authorization: Bearer TOKEN)",
        401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _origin_name(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""
