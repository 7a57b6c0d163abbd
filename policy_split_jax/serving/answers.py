"""Answers as the OpenAI API spells them: whole ones and the pieces of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from policy_split_jax.sampler.batcher import FinishReason


class Update(NamedTuple):
    """What one choice has gained."""

    index: int
    text: str
    tokens: list[str]
    """Each new token's own text."""
    logprobs: list[float]
    """Of the sampled tokens, at the sampling temperature (nats)."""
    finish_reason: FinishReason | None


@dataclass
class Choice:
    """One answer, as far as it has come."""

    index: int
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def gain(self, update: Update) -> None:
        self.text += update.text
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.finish_reason = update.finish_reason


class Usage(NamedTuple):
    """Tokens read and made."""

    prompt: int
    completion: int

    def to_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True)
class Answer:
    """What all objects of one request share."""

    kind: Literal["chat", "text"]
    name: str
    created: int
    """Seconds since 1970."""
    model: str
    with_logprobs: bool

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The response to a request that does not stream."""
        return self._object("", [self._whole_choice(choice) for choice in choices]) | {"usage": usage.to_json()}

    def first(self, index: int) -> list[dict[str, Any]]:
        """What opens a choice of a stream: of a chat, whose turn it is."""
        if self.kind == "text":
            return []
        return [self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})]

    def piece(self, update: Update) -> dict[str, Any]:
        """An update of a stream."""
        choice: dict[str, Any] = {"index": update.index, "finish_reason": update.finish_reason}
        if self.kind == "chat":
            choice["delta"] = {"content": update.text} if update.text else {}
        else:
            choice["text"] = update.text
        return self._chunk(choice | self._logprobs(update.tokens, update.logprobs))

    def usage_piece(self, usage: Usage) -> dict[str, Any]:
        """The last object of a stream that was asked for its usage."""
        return self._object(".chunk", []) | {"usage": usage.to_json()}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        text = (
            {"message": {"role": "assistant", "content": choice.text}} if self.kind == "chat" else {"text": choice.text}
        )
        shared = {"index": choice.index, "finish_reason": choice.finish_reason}
        return shared | text | self._logprobs(choice.tokens, choice.logprobs)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._object(".chunk", [choice])

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.kind == "chat" else "text_completion"
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _logprobs(self, tokens: Sequence[str], logprobs: Sequence[float]) -> dict[str, Any]:
        if not self.with_logprobs:
            return {"logprobs": None}
        if self.kind == "text":
            return {"logprobs": {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None}}
        content = [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        return {"logprobs": {"content": content, "refusal": None}}
