"""What a client gets that is not answered, and what the log says of it."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

_log = logging.getLogger(__name__)
# Of a message that may hold what a client has sent.
_LONGEST = 500


class ApiError(Exception):
    """A request that cannot be answered; becomes the API's error object."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")
        self.status, self.code, self.headers = status, code, headers
        self.param = param and param[:_LONGEST]

    @property
    def kind(self) -> str:
        """The API's `type`."""
        return "server_error" if self.status >= 500 else "invalid_request_error"


def error_object(error: ApiError) -> dict[str, Any]:
    """The API's error object."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}


def answer_error(scope: Scope, error: ApiError) -> JSONResponse:
    """The answer to a request that is refused, which is logged."""
    log_error(scope, error)
    return JSONResponse(error_object(error), error.status, error.headers)


def log_error(scope: Scope, error: ApiError) -> None:
    """One line, whatever the client has sent: it is spelt as Python spells strings."""
    client = (scope.get("client") or ("unknown",))[0]
    _log.warning("%s %.100r from %s: %d %s", scope["method"], scope["path"], client, error.status, repr(str(error)))
