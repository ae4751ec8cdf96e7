"""What went wrong, in the words of an answer: the sender's mistakes are told, the server's own troubles only to its log."""

from __future__ import annotations

import errno
import logging
import sqlite3

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from adapterhub.errors import (
    DiskFull,
    ExpressionError,
    HubError,
    ManifestError,
    NameInUse,
    NotFound,
    TagMoved,
    UnsafeFile,
    UsageError,
)

FULL = "the registry's disk is full"
_STATUS = {
    NotFound: 404,
    NameInUse: 409,
    TagMoved: 412,
    UsageError: 400,
    ManifestError: 400,
    ExpressionError: 400,
    UnsafeFile: 400,
}
"""What only a sender causes, and whose words name nothing of the server's. All else is the server's own."""
_log = logging.getLogger("adapterhub.registry")


def add_faults(app: FastAPI) -> None:
    """Let every error of the app's routes be `{"error", "hint"}`."""

    @app.exception_handler(HubError)
    def told(request: Request, error: HubError) -> JSONResponse:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        if status < 500:
            return JSONResponse({"error": str(error), "hint": error.hint}, status)
        _log.error("%s %r: %s (%s)", request.method, request.url.path, error, error.hint)
        return _full() if is_full(error) else _broken()

    @app.exception_handler(Exception)
    def bug(request: Request, error: Exception) -> JSONResponse:
        return _full() if is_full(error) else _broken()  # uvicorn logs it

    @app.exception_handler(404)
    @app.exception_handler(405)
    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail), "hint": ""}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors()[:5])
        return JSONResponse({"error": wrong[:500], "hint": "docs/guide/registry.md lists what each route takes"}, 422)


def is_full(error: BaseException | None) -> bool:
    """Whether it came of a full disk, however it was put in words since."""
    while error is not None:
        if isinstance(error, DiskFull):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if isinstance(error, sqlite3.Error) and "disk is full" in str(error):
            return True
        if getattr(error, "sqlstate", "") == "53100":  # PostgreSQL's
            return True
        error = getattr(error, "orig", None) or error.__cause__ or error.__context__
    return False


def _full() -> JSONResponse:
    return JSONResponse({"error": FULL, "hint": "ask who runs it to make room; nothing was changed"}, 507)


def _broken() -> JSONResponse:
    told = {
        "error": "the registry cannot do that: something is wrong on its side",
        "hint": "its log says what; ask who runs it",
    }
    return JSONResponse(told, 500)
