"""What a request may say: OpenAI's fields with their limits, and the sampling fields of vllm and llama-server.

A field that would change the answer is obeyed or refused, and never ignored.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import from_json

from launch.serving.errors import ApiError
from model.sampling import Sampling

# Fields of OpenAI that are not implemented, and the values with which they ask for nothing. null does so, too.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "top_logprobs": (0,), "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
}  # fmt: skip
# Fields that do not concern the answer.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool = False  # filler against eavesdroppers, of which this server adds none


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _first(value: Any) -> Any:
    """The prompt itself of a list that has only one."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list) else value


Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16), BeforeValidator(_several)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)] | None
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Request(_Fields):
    """What both kinds of requests have; a field that is missing or null has its default."""

    model: str | None = None
    max_tokens: Tokens = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampling(self) -> Sampling:
        """Raises ApiError for a value out of its range."""
        given = {name: getattr(self, name) for name in SAMPLING}
        try:
            return Sampling(**{name: value for name, value in given.items() if value is not None})
        except ValueError as e:
            raise ApiError(400, str(e), param=str(e).partition(" ")[0]) from None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    """Of /v1/completions: a text, or the ids of its tokens, that the model continues."""

    prompt: Annotated[str | list[int], BeforeValidator(_first)]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None  # those of the likeliest tokens are not known

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    def most_tokens(self, room: int) -> int:
        """The length of the answer in tokens, which by default is that of OpenAI's server."""
        return self.max_tokens or min(16, room)


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """{"role", "content"}, which chat templates know."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """Of /v1/chat/completions: messages, to which the model answers."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens = None
    logprobs: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    def most_tokens(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens or room


AnyRequest = TypeVar("AnyRequest", bound=Request)


def parse(kind: type[AnyRequest], raw: bytes) -> AnyRequest:
    """The request that the JSON says. Raises ApiError for the first field that is wrong."""
    try:
        fields = from_json(raw, allow_inf_nan=False)
    except ValueError as e:
        raise ApiError(400, f"the body is not JSON: {e}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object")
    for name, value in fields.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise ApiError(400, f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")
    known = {name: value for name, value in fields.items() if name not in NEUTRAL and name not in IGNORED}
    try:
        return kind.model_validate(known)
    except pydantic.ValidationError as e:
        raise _explained(e) from None


def _explained(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        where = ".".join(map(str, first["loc"]))
        return ApiError(400, f"there is no field {where}", param=name, code="unknown_parameter")
    if name == "prompt" and first["type"] != "missing":
        return ApiError(400, "prompt must be one text, or a list of the token ids of one text", param=name)
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("list["))
    return ApiError(400, f"{where}: {first['msg']}", param=name)
