"""The model that a request means: one is in memory, the others of this machine are only known by name."""

from __future__ import annotations

from typing import cast

from starlette.requests import Request

from lsp_server.http.errors import HttpError
from lsp_server.http.names import Known, Names
from lsp_server.http.service import Service


def service_of(request: Request) -> Service:
    """The service behind a request."""
    return cast(Service, request.app.state.service)


def names_of(service: Service) -> Names:
    """The names of models that the service knows."""
    session = service.session_of()
    return Names(session.store, session.paths.home / "http-models.json")


def model_of(service: Service, wanted: str) -> Known:
    """The model that a client asks for.

    Args:
        service: The service.
        wanted: Its name, as the client wrote it.

    Returns:
        The model.

    Raises:
        HttpError: 400: no name; 404: nobody knows it; 409: another one is in memory.
    """
    if not wanted:
        raise HttpError(400, "model is required", param="model")
    known = names_of(service).find(wanted, service.host.local_or_none)
    _check_is_held(service, known, wanted)
    return known


def _check_is_held(service: Service, known: Known, wanted: str) -> None:
    """One model is held; another one is not loaded for a client."""
    status = service.host.status
    if status.state == "ready" and status.model != known.local.name:
        raise HttpError(
            409,
            f"'{wanted}' is on this machine, but {status.model} is in memory",
            code="other_model",
            hint=f"Ask for {status.model}, or start planpatch serve --model {known.local.name}.",
            param="model",
        )
