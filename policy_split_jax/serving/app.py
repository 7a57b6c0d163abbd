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
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from policy_split_jax.modes import MODE_NAMES, render_chat, system_turn
from policy_split_jax.policy import Policy
from policy_split_jax.sampler.batcher import Prompt, Sampling
from policy_split_jax.sampler.rollout import rollout_keys
from policy_split_jax.serving.answers import Answer, Choice, Update, Usage
from policy_split_jax.serving.metrics import ServerMetrics
from policy_split_jax.serving.requests import (
    HIGH_ENTROPY_SUFFIX,
    ApiError,
    ChatRequest,
    CompletionRequest,
    mode_of,
)
from policy_split_jax.serving.service import EngineService, EngineStopped, Job
from policy_split_jax.text_stream import TextStream

_Body = TypeVar("_Body", bound=BaseModel)
_Result = TypeVar("_Result")
# What servers answer, by custom, to a client that has hung up.
_CLIENT_GONE = 499


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
            exception_handlers={ApiError: _api_error, EngineStopped: _engine_stopped},  # type: ignore[dict-item]
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
        body = await _read(request, ChatRequest)
        mode = mode_of(body.model, self._name)
        prompt = render_chat(self._policy.tokenizer, body.turns, mode, self._policy.prompts)
        return await self._answer(request, self._open("chat", body, mode, prompt), body.stream)

    async def _completions(self, request: Request) -> Response:
        body = await _read(request, CompletionRequest)
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
            raise ApiError(
                f"the prompt has {len(prompt)} tokens; this server takes 1 to {self._max_prompt_tokens}",
                code="context_length_exceeded",
            )
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
            return StreamingResponse(self._events(work), media_type="text/event-stream")
        choices = await _while_connected(request, self._gathered(work))
        if choices is None:
            return Response(status_code=_CLIENT_GONE)
        made = sum(len(choice.tokens) for choice in choices)
        return JSONResponse(work.answer.whole(choices, Usage(work.prompt_tokens, made)))

    async def _gathered(self, work: _Work) -> list[Choice]:
        choices = [Choice(index) for index in range(work.choices)]
        async for update in self._updates(work):
            choices[update.index].gain(update)
        return choices

    async def _events(self, work: _Work) -> AsyncIterator[str]:
        """Server-sent events."""
        made = 0
        for index in range(work.choices):
            for opening in work.answer.first(index):
                yield _event(opening)
        try:
            async for update in self._updates(work):
                made += len(update.tokens)
                yield _event(work.answer.piece(update))
        except EngineStopped as error:
            yield _event(_error_object(str(error), kind="server_error"))
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
            finally:
                work.job.close()


async def _read(request: Request, kind: type[_Body]) -> _Body:
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ApiError(f"{place}: {first['msg']}" if place else first["msg"], param=place or None) from None


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


def _error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(_error_object(str(error), "invalid_request_error", error.param, error.code), error.status)


async def _engine_stopped(request: Request, error: EngineStopped) -> Response:
    return JSONResponse(_error_object(str(error), "server_error"), 503)


def serve(server: Server, bound: socket.socket) -> None:
    """Serves on a bound socket until it is interrupted; requests that run then have 30 seconds to end."""
    config = uvicorn.Config(server.app(), log_level="warning", timeout_graceful_shutdown=30)
    uvicorn.Server(config).run([bound])
