"""HTTP/1.1 connections that wait for no client for ever."""

import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 75.0
"""A request must have come in whole so long after its connection or its first byte."""
STALL_SECONDS = 30.0
"""A client that takes nothing of its answer for so long is cut off."""
_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

_log = logging.getLogger(__name__)


class Connection(H11Protocol):
    """uvicorn's, which by itself only limits how long a connection is idle between two requests."""

    # Timers of the event loop, whichever it is.
    _reading: Any = None
    _stalled: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._reading = self.loop.call_later(REQUEST_SECONDS, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        incomplete = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not incomplete:
            self._reading = _cancelled(self._reading)
        elif self._reading is None:
            self._reading = self.loop.call_later(REQUEST_SECONDS, self._late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._reading, self._stalled = _cancelled(self._reading), _cancelled(self._stalled)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closing waits until what is left has been sent.
        self._stalled = _cancelled(self._stalled) or self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def _late(self) -> None:
        """Where no answer has begun there is one; then nothing more is read."""
        if not self.transport.is_closing():
            _log.warning("from %s: a request that did not end in %.0f s", (self.client or ("unknown",))[0],
                         REQUEST_SECONDS)  # fmt: skip
        if self.conn.our_state is h11.IDLE:
            self.transport.write(_LATE)
            self.transport.close()
        else:
            self.transport.abort()

    def _cut(self) -> None:
        _log.warning("from %s: takes nothing of its answer", (self.client or ("unknown",))[0])
        self.transport.abort()


def _cancelled(timer: Any) -> None:
    if timer is not None:
        timer.cancel()
