"""Models that the settings have registered at the start of a server."""

import asyncio

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from server.settings import Settings
from server.supervisor.model_server_api.startup_models import register_startup_models
from server.supervisor.registrations.service import RegistrationService
from tests.server.supervisor.registrations.test_service import Fleet


def start(*queries: str) -> tuple[RegistrationService, Fleet]:
    """What is registered at a start with these."""

    async def run() -> tuple[RegistrationService, Fleet]:
        fleet = Fleet()
        service = RegistrationService("s3://models", fleet)
        settings = Settings.model_validate({"store": "s3://models", "register_models": list(queries)})
        await register_startup_models(service, settings)
        await asyncio.gather(*service._background)
        return service, fleet

    return asyncio.run(run())


def test_each_is_registered_as_a_client_would() -> None:
    """With one worker unless it says another number; a version that is not the first can be the default."""
    service, fleet = start(
        "url=probe.mar",
        "url=plain.mar&model_name=team/p&model_version=1&initial_workers=0",
        "url=plain.mar&model_name=team/p&model_version=2&batch_size=4&max_batch_delay=20&default_version=true",
    )
    assert list(service.table) == ["probe", "team/p"]
    assert (service.table.find("probe").options.min_workers, service.table.find("probe").at_start) == (1, True)
    default = service.table.find("team/p")
    assert (default.version, default.options.batch_size, default.options.max_batch_delay_ms) == ("2", 4, 20)
    assert service.table.find("team/p", "1").options.min_workers == 0
    assert fleet.said.count("load probe.mar") == fleet.said.count("load plain.mar") == 1


def test_what_cannot_be_registered_costs_no_other() -> None:
    """It is in the log, with what to do."""
    with capture_logs() as said:
        service, _ = start("url=nosuch.mar", "url=probe.mar&batch_size=many", "url=../x.mar", "url=plain.mar")
    assert list(service.table) == ["plain"]
    refused = [line for line in said if line["event"] == "not_registered_at_start"]
    assert len(refused) == 3
    assert all("correct it in register_models" in line["then"] for line in refused)


@pytest.mark.parametrize(
    ("query", "why"),
    [("model_name=a", "names no archive"), ("url=a.mar&workers=2", "no parameter 'workers'"), ("", "names no archive")],
)
def test_a_query_that_says_nothing_is_refused_with_the_settings(query: str, why: str) -> None:
    """Before anything is started."""
    with pytest.raises(ValidationError, match=why):
        Settings.model_validate({"store": "s3://models", "register_models": [query]})
