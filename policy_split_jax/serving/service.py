"""The engine on a thread of its own, for many requests at once."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from policy_split_jax.sampler.batcher import Batcher, FinishReason, Place, Prompt, Rollout, Sampling

_log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """What one rollout of a request has gained."""

    index: int
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None
    """None while it goes on."""


class EngineStopped(RuntimeError):
    """The engine has ended, by an error or because the server shuts down."""


class EngineBusy(RuntimeError):
    """As many rollouts are asked for as the service takes."""


@dataclass
class _Client:
    """Whoever waits for a request: its queue, and how far each rollout has been told."""

    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece | None]"
    rollouts: int
    """How many have not ended."""
    told: dict[int, int] = field(default_factory=dict)

    def tell(self, piece: Piece | None) -> None:
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class _Add(NamedTuple):
    name: int
    prompt: Prompt
    sampling: Sampling
    client: _Client


class _Cancel(NamedTuple):
    name: int
    index: int | None


class EngineService:
    """Runs a Batcher on a thread; requests of all clients share its slots."""

    def __init__(self, batcher: Batcher, *, max_rollouts: int = 2048, max_seconds: float = 600.0):
        """Takes at most `max_rollouts` at once, in slots or waiting, and each request for at most `max_seconds`."""
        self._batcher = batcher
        self._max_rollouts = max_rollouts
        self._max_seconds = max_seconds
        self._open = 0
        self._inbox: queue.Queue[_Add | _Cancel | None] = queue.Queue()
        self._clients: dict[int, _Client] = {}
        self._names = count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped = False
        self.error: BaseException | None = None
        """Why the engine ended, if by an error."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the present decode steps; clients still waiting get EngineStopped."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    @property
    def running(self) -> int:
        """Rollouts in slots."""
        return self._batcher.running

    @property
    def waiting(self) -> int:
        """Rollouts without a slot yet."""
        return self._batcher.waiting

    def open(self, prompt: Prompt, sampling: Sampling) -> "Job":
        """Hands a request to the engine; to be called on the event loop, and the job to be closed whatever happens.

        Raises EngineStopped and EngineBusy.
        """
        if not self.alive:
            raise EngineStopped("the engine has stopped")
        rollouts = len(prompt.keys)
        if self._open + rollouts > self._max_rollouts:
            raise EngineBusy(f"this server takes {self._max_rollouts} answers at once, and has {self._open}")
        self._open += rollouts
        name = next(self._names)
        loop = asyncio.get_running_loop()
        client = _Client(loop, asyncio.Queue(), rollouts)
        self._inbox.put(_Add(name, prompt, sampling, client))
        return Job(self, name, client, rollouts, loop.time() + self._max_seconds)

    def closed(self, name: int, rollouts: int) -> None:
        """Gives up what is left of a request, which had so many rollouts, and makes room for others."""
        self._open -= rollouts
        self.cancel(name)

    def cancel(self, name: int, index: int | None = None) -> None:
        """Gives up a request, or one of its rollouts; nothing happens where it has ended."""
        self._inbox.put(_Cancel(name, index))

    def _run(self) -> None:
        try:
            while self._take():
                self._tell(self._batcher.step())
        except BaseException as error:
            _log.critical("the engine has stopped; start the server again", exc_info=error)
            self.error = error
        self._stopped = True
        for client in self._clients.values():
            client.tell(None)
        while not self._inbox.empty():
            order = self._inbox.get()
            if isinstance(order, _Add):
                order.client.tell(None)

    def _take(self) -> bool:
        """Obeys all orders, waiting for one while there is nothing else to do; False at the end."""
        while not (self._inbox.empty() and self._batcher.busy):
            order = self._inbox.get()
            if order is None:
                return False
            if isinstance(order, _Add):
                self._clients[order.name] = order.client
                self._batcher.add(order.name, order.prompt, order.sampling)
            else:
                self._batcher.cancel(order.name, order.index)
                if order.index is None:
                    self._clients.pop(order.name, None)
        return True

    def _tell(self, ended: list[tuple[Place, Rollout]]) -> None:
        for place, rollout in self._batcher.partial():
            self._tell_one(place, rollout, None)
        for place, rollout in ended:
            self._tell_one(place, rollout, rollout.finish_reason)

    def _tell_one(self, place: Place, rollout: Rollout, reason: FinishReason | None) -> None:
        client = self._clients.get(place.prompt)
        if client is None:
            return
        told = client.told.get(place.index, 0)
        client.told[place.index] = len(rollout.tokens)
        client.rollouts -= reason is not None
        if not client.rollouts:
            del self._clients[place.prompt]
        client.tell(Piece(place.index, rollout.tokens[told:].tolist(), rollout.logprobs[told:].tolist(), reason))


class Job:
    """A request in the engine's hands; closing it gives its slots to others."""

    def __init__(self, service: EngineService, name: int, client: _Client, rollouts: int, deadline: float):
        """`deadline` is in the time of the event loop."""
        self._service = service
        self._name = name
        self._client = client
        self._rollouts = rollouts
        self._deadline = deadline
        self._open = set(range(rollouts))
        self._closed = False

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the rollouts gain, until all have ended or were dropped. Raises EngineStopped and TimeoutError."""
        while self._open:
            async with asyncio.timeout_at(self._deadline):
                piece = await self._client.pieces.get()
            if piece is None:
                raise EngineStopped("the engine has stopped") from self._service.error
            if piece.index in self._open:
                if piece.finish_reason is not None:
                    self._open.discard(piece.index)
                yield piece

    def drop(self, index: int) -> None:
        """Ends one rollout here: its client has seen enough."""
        if index in self._open:
            self._open.discard(index)
            self._service.cancel(self._name, index)

    def close(self) -> None:
        """Ends whatever still runs; once is enough."""
        self._open.clear()
        if not self._closed:
            self._closed = True
            self._service.closed(self._name, self._rollouts)
