"""Errors that a client sees: an HTTP status and OpenAI's error object."""

from typing import Any


class ApiError(Exception):
    """What is wrong with a request, or why it is not answered.

    Attributes:
      status: of HTTP.
      param: the field of the request that is wrong, if it is one.
      code: a word for programs, such as context_length_exceeded.
      retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def queue_is_full(waiting: int) -> ApiError:
    return ApiError(429, f"{waiting} requests wait already; send it again later", code="queue_full", retry_after=1)


def stopping() -> ApiError:
    return ApiError(503, "the server stops; send the request again when it is back", code="stopping", retry_after=10)
