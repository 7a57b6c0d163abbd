"""What clients may ask, as the OpenAI API spells it; whatever is not understood is an error, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from policy_split_jax.limits import MAX_SEED, TEMPERATURES, is_temperature
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.serving.errors import ApiError

HIGH_ENTROPY_SUFFIX = ":high-entropy"
_Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)]


def _representable(temperature: float) -> float:
    if not is_temperature(temperature):
        raise ValueError(f"must be {TEMPERATURES}")
    return temperature


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="forbid")
    model: str
    n: int = Field(1, ge=1, le=128)
    temperature: Annotated[float, Field(ge=0, le=10), AfterValidator(_representable)] = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    """Not of the OpenAI API, but of most servers; 0 is off."""
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: _Stop = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """The client's own name for its user; changes nothing."""
    # Accepted at the values that mean "off", which some clients send.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """A null means the default, and one stop text may stand alone."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        return given


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn; tools and pictures are not understood."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The turn's text; of an assistant's what follows its thoughts, as Qwen3's own template has it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        text = "".join(parts)
        return text.rpartition("</think>")[2].lstrip("\n") if self.role == "assistant" else text


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Literal[0] | None = None

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of each turn."""
        return [("system" if turn.role == "developer" else turn.role, turn.text) for turn in self.messages]

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs


class CompletionRequest(_Request):
    """POST /v1/completions: the prompt is continued as it is, without the chat template."""

    prompt: str | Annotated[list[int], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: Literal[0, 1] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs is not None


def mode_of(model: str, name: str) -> int:
    """The mode that a request's model name asks for: `name`, or `name:high-entropy`."""
    if model == name:
        return NORMAL
    if model == name + HIGH_ENTROPY_SUFFIX:
        return HIGH_ENTROPY
    raise ApiError(
        f"the model {model!r} does not exist; there are {name!r} and {name + HIGH_ENTROPY_SUFFIX!r}",
        status=404,
        param="model",
        code="model_not_found",
    )
