"""Registers models at the start of the server, as `load_models` of TorchServe and Multi Model Server does.

Each is the query of a `POST /models`, which a settings file can hold. What cannot be registered is in the log, and the
server serves the others.
"""

from urllib.parse import parse_qsl

import structlog

from server.ipc.control import ControlError
from server.settings import Settings
from server.supervisor.model_server_api.parameters import Parameters, parse_registration
from server.supervisor.registrations.refusals import RegistrationRefused
from server.supervisor.registrations.service import RegistrationService

DEFAULT_VERSION = "default_version"  #: true: this version answers where none is named
WORKERS = 1  #: of a model that says no number: it is to be loaded

log = structlog.get_logger()


async def register_startup_models(service: RegistrationService, settings: Settings) -> None:
    """Register all of `register_models`, in their order; they load while the server goes on."""
    for query in settings.register_models:
        await _register(service, query, settings)


async def _register(service: RegistrationService, query: str, settings: Settings) -> None:
    given = Parameters(dict(parse_qsl(query, keep_blank_values=True)))
    try:
        asked = parse_registration(given, settings, workers=WORKERS)
        found = await service.register(asked, wait=not asked.options.min_workers, at_start=True)
        if given.parse_flag(DEFAULT_VERSION):
            await service.set_default(found.name, found.version)
    except (RegistrationRefused, ControlError) as error:
        then = "correct it in register_models, or register it by POST /models"
        log.error("not_registered_at_start", model=query[:300], why=str(error), then=then)  # noqa: TRY400 -- no fault of ours
