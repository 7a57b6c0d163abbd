"""The HTTP server: an OpenAI-compatible API whose model names choose the mode.

`<name>` is the normal mode, `<name>:high-entropy` the high-entropy one. API reference:
https://platform.openai.com/docs/api-reference
"""

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from policy_split_jax.access import own_names
from policy_split_jax.modes import MODE_NAMES, render_chat, system_turn
from policy_split_jax.policy import Policy
from policy_split_jax.sampler.batcher import Prompt, Sampling
from policy_split_jax.sampler.rollout import rollout_keys
from policy_split_jax.serving.answers import Answer, Choice, Update, Usage
from policy_split_jax.serving.connection import Connection
from policy_split_jax.serving.errors import ApiError, answer_error, error_object, log_error
from policy_split_jax.serving.guard import Guard
from policy_split_jax.serving.metrics import ServerMetrics
from policy_split_jax.serving.requests import (
    HIGH_ENTROPY_SUFFIX,
    ChatRequest,
    CompletionRequest,
    mode_of,
)
from policy_split_jax.serving.service import EngineBusy, EngineService, EngineStopped, Job
from policy_split_jax.text_stream import TextStream

_Body = TypeVar("_Body", bound=BaseModel)
_Result = TypeVar("_Result")
# What servers answer, by custom, to a client that has hung up.
_CLIENT_GONE = 499
# A body has room for the longest prompt in any spelling, and must have come in so soon.
_BODY_BYTES, _BODY_BYTES_PER_TOKEN = 1 << 16, 64
_BODY_SECONDS = 60.0
# When a client should ask again that was told that the server is busy.
_RETRY_SECONDS = 5


@dataclass(frozen=True)
class _Work:
    """A request that the engine has taken."""

    job: Job
    answer: Answer
    mode: int
    prompt_tokens: int
    choices: int
    stops: list[str]
    include_usage: bool


class _Stream(StreamingResponse):
    """A stream that gives its slots back however it ends, also where its client has gone before it begins."""

    def __init__(self, events: AsyncIterator[str], job: Job):
        super().__init__(events, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


class Server:
    """The routes, and what they need."""

    def __init__(
        self, policy: Policy, service: EngineService, name: str, *, max_prompt_tokens: int, max_new_tokens: int
    ):
        self._policy = policy
        self._service = service
        self._name = name
        self._max_prompt_tokens = max_prompt_tokens
        self._max_new_tokens = max_new_tokens
        self._metrics = ServerMetrics(service)
        self._since = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application; it ends the engine when it shuts down."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self._service.stop)

        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._expose),
            ],
            exception_handlers=_HANDLERS,
            lifespan=lifespan,
        )

    async def _models(self, request: Request) -> Response:
        names = (self._name, self._name + HIGH_ENTROPY_SUFFIX)
        models = [{"id": name, "object": "model", "created": self._since, "owned_by": "policy-split"} for name in names]
        return JSONResponse({"object": "list", "data": models})

    async def _health(self, request: Request) -> Response:
        alive = self._service.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def _expose(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=self._metrics.media_type)

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, ChatRequest)
        mode = mode_of(body.model, self._name)
        # Rendering many turns takes long, and each has a token at least.
        if len(body.messages) > self._max_prompt_tokens:
            raise self._too_long(f"the conversation has {len(body.messages)} turns")
        prompt = render_chat(self._policy.tokenizer, body.turns, mode, self._policy.prompts)
        return await self._answer(request, self._open("chat", body, mode, prompt), body.stream)

    async def _completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionRequest)
        mode = mode_of(body.model, self._name)
        tokenizer = self._policy.tokenizer
        given = body.prompt
        # A raw prompt may spell special tokens: whoever writes one writes the whole context.
        prompt = tokenizer(given, add_special_tokens=False)["input_ids"] if isinstance(given, str) else given
        if not all(0 <= token < self._policy.config.vocab_size for token in prompt):
            raise ApiError(f"token ids must be in [0, {self._policy.config.vocab_size})", param="prompt")
        try:
            prompt = system_turn(tokenizer, mode, self._policy.prompts) + prompt
        except ValueError as error:
            raise ApiError(f"{error}; use chat completions", param="model") from None
        return await self._answer(request, self._open("text", body, mode, prompt), body.stream)

    def _open(self, kind: Any, body: ChatRequest | CompletionRequest, mode: int, prompt: list[int]) -> _Work:
        """Hands the request to the engine."""
        if not 1 <= len(prompt) <= self._max_prompt_tokens:
            raise self._too_long(f"the prompt has {len(prompt)} tokens")
        limit = body.limit or self._max_new_tokens
        if limit > self._max_new_tokens:
            raise ApiError(
                f"max_tokens is {limit}; this server makes at most {self._max_new_tokens}", param="max_tokens"
            )
        seed = secrets.randbits(32) if body.seed is None else body.seed
        keys = rollout_keys(jax.random.key(seed), np.zeros(1, np.int32), np.full(1, mode), body.n)[0]
        job = self._service.open(Prompt(prompt, keys), Sampling(limit, body.temperature, body.top_k, body.top_p))
        name = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        return _Work(
            job=job,
            answer=Answer(kind, name, int(time.time()), body.model, body.with_logprobs),
            mode=mode,
            prompt_tokens=len(prompt),
            choices=body.n,
            stops=body.stop,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )

    async def _answer(self, request: Request, work: _Work, stream: bool) -> Response:
        if stream:
            return _Stream(self._events(request.scope, work), work.job)
        try:
            choices = await _while_connected(request, self._gathered(work))
        finally:
            work.job.close()
        if choices is None:
            return Response(status_code=_CLIENT_GONE)
        made = sum(len(choice.tokens) for choice in choices)
        return JSONResponse(work.answer.whole(choices, Usage(work.prompt_tokens, made)))

    async def _gathered(self, work: _Work) -> list[Choice]:
        choices = [Choice(index) for index in range(work.choices)]
        async for update in self._updates(work):
            choices[update.index].gain(update)
        return choices

    async def _events(self, scope: Scope, work: _Work) -> AsyncIterator[str]:
        """Server-sent events."""
        made = 0
        for index in range(work.choices):
            for opening in work.answer.first(index):
                yield _event(opening)
        try:
            async for update in self._updates(work):
                made += len(update.tokens)
                yield _event(work.answer.piece(update))
        except (EngineStopped, ApiError) as error:
            told = error if isinstance(error, ApiError) else _stopped(error)
            log_error(scope, told)
            yield _event(error_object(told))
            return
        if work.include_usage:
            yield _event(work.answer.usage_piece(Usage(work.prompt_tokens, made)))
        yield "data: [DONE]\n\n"

    async def _updates(self, work: _Work) -> AsyncIterator[Update]:
        """The engine's pieces as text; ends a choice at its stop texts, and everything when its reader is gone."""
        policy = self._policy
        texts = [TextStream(policy.tokenizer, policy.stop_ids, work.stops) for _ in range(work.choices)]
        with self._metrics.request(MODE_NAMES[work.mode], work.prompt_tokens) as count:
            try:
                async for piece in work.job.pieces():
                    count(len(piece.tokens))
                    added = texts[piece.index].add(piece.tokens, last=piece.finish_reason is not None)
                    if added.stopped:
                        work.job.drop(piece.index)
                    tokens = policy.tokenizer.batch_decode([[token] for token in piece.tokens])
                    reason = "stop" if added.stopped else piece.finish_reason
                    yield Update(piece.index, added.text, tokens, piece.logprobs, reason)
            except TimeoutError:
                raise ApiError("the answer took too long; ask for less, or when the server is less busy", 503) from None
            finally:
                work.job.close()

    def _too_long(self, what: str) -> ApiError:
        return ApiError(
            f"{what}; this server takes 1 to {self._max_prompt_tokens} tokens", code="context_length_exceeded"
        )

    async def _read(self, request: Request, kind: type[_Body]) -> _Body:
        limit = _BODY_BYTES + _BODY_BYTES_PER_TOKEN * self._max_prompt_tokens
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await _body(request, limit)
        except TimeoutError:
            raise ApiError(f"the body did not come in {_BODY_SECONDS:.0f} seconds", 408) from None
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ApiError(f"{place}: {first['msg']}" if place else first["msg"], param=place or None) from None


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise ApiError(f"the body is longer than the {limit} bytes that this server reads", 413)
    return bytes(body)


async def _while_connected(request: Request, work: Awaitable[_Result]) -> _Result | None:
    """The work's result, or None where the client hangs up before it is done; the work is then cancelled."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _stopped(error: EngineStopped) -> ApiError:
    return ApiError(str(error), 503)


async def _api_error(request: Request, error: ApiError) -> Response:
    return answer_error(request.scope, error)


async def _engine_stopped(request: Request, error: EngineStopped) -> Response:
    return answer_error(request.scope, _stopped(error))


async def _engine_busy(request: Request, error: EngineBusy) -> Response:
    retry = {"Retry-After": str(_RETRY_SECONDS)}
    return answer_error(request.scope, ApiError(str(error), 429, code="rate_limit_exceeded", headers=retry))


async def _http_error(request: Request, error: HTTPException) -> Response:
    """An unknown path or method."""
    return answer_error(request.scope, ApiError(error.detail, error.status_code, headers=error.headers))


async def _client_gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_GONE)


_HANDLERS: dict[Any, Any] = {
    ApiError: _api_error,
    EngineStopped: _engine_stopped,
    EngineBusy: _engine_busy,
    HTTPException: _http_error,
    ClientDisconnect: _client_gone,
}


def serve(server: Server, bound: socket.socket, token: str | None) -> None:
    """Serves on a bound socket until it is interrupted; requests that run then have 30 seconds to end."""
    http_server(server, bound, token).run([bound])


def http_server(server: Server, bound: socket.socket, token: str | None) -> uvicorn.Server:
    """What serves on this socket: without a `token` to clients of this machine alone, see `Guard`."""
    app = Guard(server.app(), token, own_names(bound.getsockname()[0]))
    config = uvicorn.Config(
        app, http=Connection, ws="none", proxy_headers=False, log_level="warning", timeout_graceful_shutdown=30
    )
    return uvicorn.Server(config)
