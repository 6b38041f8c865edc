"""Errors as clients see them: OpenAI's shape, vLLM's types, nothing of this machine.

::

    exception                       status  type
    ApiError                        its own
    AdapterNotFoundError            404     NotFoundError
    AdapterCapacityError            503     ServiceUnavailableError
    AdapterRefusedError, RequestError, ValueError of the engine's checks
                                    400     BadRequestError
    EngineDeadError                 503     ServiceUnavailableError
    GenerationError                 500     InternalServerError, with its message
    ConstraintError                 400     BadRequestError
    anything else                   500     InternalServerError, without its message
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from jaxlora.errors import (
    AdapterCapacityError,
    AdapterError,
    AdapterNotFoundError,
    ConstraintError,
    EngineDeadError,
    GenerationError,
)

logger = logging.getLogger(__name__)

_TYPES = {
    400: "BadRequestError",
    401: "UnauthorizedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(HTTPException):
    """A reply that is not a success: HTTP status, message, type and the parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        # It may cite what is no Unicode text and could not be sent.
        self.message = message.encode("utf-8", "backslashreplace").decode()
        self.kind = kind or _TYPES.get(status, "BadRequestError" if status < 500 else _TYPES[500])
        self.param = param

    def body(self) -> dict[str, Any]:
        """What is sent, also as an event of a stream."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.status_code,
            }
        }

    def response(self) -> JSONResponse:
        """The reply."""
        return JSONResponse(
            self.body(), status_code=self.status_code, headers=dict(self.headers or {})
        )


class ClientGoneError(Exception):
    """The client closed its connection before there was a reply."""


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception."""
    match error:
        case ApiError():
            return error
        case ClientGoneError():
            # Nobody reads it; the access log has nginx's status for that.
            return ApiError(499, "The client has gone.")
        case EngineDeadError():
            return ApiError(503, "The engine has stopped.")
        case AdapterNotFoundError():
            return ApiError(404, str(error))
        case AdapterCapacityError():
            return ApiError(503, str(error))
        case AdapterError():
            return ApiError(400, str(error))
        case ConstraintError() | ValueError():
            return ApiError(400, str(error), param=_field_in(error))
        case GenerationError():
            return ApiError(500, str(error))
        case RequestValidationError():
            return _invalid(error)
        case HTTPException(detail="There was an error parsing the body"):
            return ApiError(400, f"the body is not JSON: {error.__cause__}")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "Internal server error")


def _field_in(error: Exception) -> str | None:
    """The field that the engine's message begins with, as in "top_p=2 must be in (0, 1]"."""
    field, equals, _ = str(error).partition("=")
    return field if equals and field.isidentifier() else None


def _invalid(error: RequestValidationError) -> ApiError:
    """Of all that is wrong with a body, the first."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    name = ".".join(str(part) for part in first["loc"] if part != "body")
    if not name:
        return ApiError(400, "the body must be a JSON object, with Content-Type: application/json")
    return ApiError(400, f"{name}: {first['msg']}", param=name)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler for everything."""
    return as_api_error(error).response()
