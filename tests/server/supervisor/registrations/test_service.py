"""What registering does to workers and fronts, in order, and that failures leave nothing behind."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence

import pytest

from model_store.archives.manifest import Kind
from model_store.names import ModelName
from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import ArchiveFacts, Batching, ModelState, RegisteredModel
from server.supervisor.registrations.refusals import (
    AlreadyRegistered,
    BadOption,
    ModelUnknown,
    NotInStore,
    NotLoaded,
)
from server.supervisor.registrations.service import RegisterRequest, RegistrationService, ScaleRequest
from server.supervisor.registrations.table import ServingOptions

ONE_WORKER = ServingOptions(min_workers=1, max_workers=1)


class Fleet:
    """Workers and fronts that note what they are told. `archives` are in the store; `broken` do not load."""

    def __init__(self) -> None:
        self.archives = {"probe.mar": ArchiveFacts("probe", "1.5", "handler.py", "python"), "plain.mar": ArchiveFacts()}
        self.broken: set[str] = set()
        self.why_broken = Situation.ARCHIVE_FAILED
        self.said: list[str] = []
        self.front: dict[str, RegisteredModel | None] = {}
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def read_archive(self, key: ModelName) -> ArchiveFacts:
        """What the archive says."""
        if key not in self.archives:
            raise ControlError(f"no object {key}", Situation.NOT_FOUND)
        return self.archives[key]

    async def load_registered(self, key: ModelName) -> None:
        """Load, when it may."""
        await self.may_load.wait()
        if key in self.broken:
            raise ControlError(f"{key} is broken", self.why_broken)
        self.said.append(f"load {key}")

    async def describe_by_code(self, key: ModelName, headers: list[tuple[str, str]]) -> bytes:
        """Repeat the headers."""
        return repr((key, headers)).encode()

    async def set_batching(self, key: ModelName, batching: Batching | None) -> None:
        """Batch."""
        self.said.append(f"batch {key} {batching and batching.size}")

    async def set_replicas(self, key: ModelName, count: int) -> None:
        """Scale."""
        self.said.append(f"replicas {key} {count}")

    async def await_replicas(self, key: ModelName) -> int:
        """As many as were asked for last."""
        self.said.append(f"await {key}")
        return 0

    async def unload_registered(self, key: ModelName) -> None:
        """Unload."""
        self.said.append(f"unload {key}")

    async def observe_registered(self, key: ModelName) -> Sequence[tuple[int, ModelState]]:
        """Nothing is loaded."""
        del key
        return []

    async def announce_registrations(self, models: dict[str, RegisteredModel | None]) -> None:
        """Fronts follow."""
        self.front |= models
        self.said.append("announce")


def over_fleet(check: Callable[[RegistrationService, Fleet], Coroutine[None, None, None]]) -> Callable[[], None]:
    """A test that runs a check over an idle fleet."""

    async def run() -> None:
        fleet = Fleet()
        await check(RegistrationService("s3://models", fleet), fleet)

    def test() -> None:
        asyncio.run(run())

    test.__doc__ = check.__doc__
    return test


async def await_background(service: RegistrationService) -> None:
    """Wait for the loads that nobody else waits for."""
    await asyncio.gather(*service._background)


@over_fleet
async def test_archive_says_name_and_version(service: RegistrationService, fleet: Fleet) -> None:
    """A client need only give the URL; what it gives besides holds."""
    found = await service.register(RegisterRequest("probe.mar"), wait=True)
    assert (found.name, found.version, found.handler) == ("probe", "1.5", "handler.py")
    found = await service.register(RegisterRequest("s3://models/plain.mar", name="other"), wait=True)
    assert (found.name, found.version, found.key) == ("other", "1.0", "plain.mar")
    assert fleet.said == ["announce", "announce"], "nothing is loaded"
    with pytest.raises(AlreadyRegistered):
        await service.register(RegisterRequest("probe.mar"), wait=True)
    with pytest.raises(NotInStore):
        await service.register(RegisterRequest("nosuch.mar"), wait=True)
    with pytest.raises(BadOption):
        await service.register(RegisterRequest("plain.mar", name="a//b"), wait=True)
    for url, handler in (("probe.mar", "other.py"), ("plain.mar", "handler.py")):
        with pytest.raises(BadOption, match="its own handler"):
            await service.register(RegisterRequest(url, name="h", handler=handler), wait=True)
    await service.register(RegisterRequest("probe.mar", name="h", handler="handler"), wait=True)


@over_fleet
async def test_workers_are_processes_of_code_archives_alone(service: RegistrationService, fleet: Fleet) -> None:
    """As many as the name has that asks for most; who waits, waits for them; others are told nothing."""
    fleet.archives["code.mar"] = ArchiveFacts("m", "1", "handler.py", "python", kind=Kind.CODE)
    two = ServingOptions(min_workers=2, max_workers=2)
    await service.register(RegisterRequest("code.mar", options=two), wait=True)
    await service.register(RegisterRequest("probe.mar", name="plain", options=two), wait=True)
    await service.register(RegisterRequest("code.mar", name="other", options=ONE_WORKER), wait=True)
    await service.scale(ScaleRequest("other", None, 3, 3), wait=False)
    assert service.table.list_replicas() == {"code.mar": 3}
    await service.unregister("other")
    await service.scale(ScaleRequest("m", None, 1, 1), wait=True)
    await service.unregister("m")
    told = [said for said in fleet.said if said.startswith(("replicas", "await"))]
    assert told == [
        "replicas code.mar 2",
        "await code.mar",
        "replicas code.mar 3",
        "replicas code.mar 2",
        "replicas code.mar 1",
        "await code.mar",
    ]
    assert service.table.list_replicas() == {}


@over_fleet
async def test_a_scale_that_fails_changes_no_number_of_processes(service: RegistrationService, fleet: Fleet) -> None:
    """In the background, what was there before holds again; nothing is left of a registration that failed."""
    fleet.archives["code.mar"] = ArchiveFacts("m", "1", "handler.py", "python", kind=Kind.CODE)
    await service.register(RegisterRequest("code.mar", options=ONE_WORKER), wait=True)
    fleet.broken.add("code.mar")
    await service.scale(ScaleRequest("m", None, 4, 4), wait=False)
    await await_background(service)
    assert service.table.list_replicas() == {}
    assert fleet.said[-1] == "replicas code.mar 1"


@over_fleet
async def test_what_does_not_load_is_not_registered(service: RegistrationService, fleet: Fleet) -> None:
    """With workers it is loaded first: fronts never learn of one that failed."""
    fleet.broken.add("probe.mar")
    with pytest.raises(NotLoaded) as caught:
        await service.register(RegisterRequest("probe.mar", options=ONE_WORKER), wait=True)
    assert caught.value.situation == Situation.ARCHIVE_FAILED
    assert (len(service.table), fleet.said) == (0, [])


@over_fleet
async def test_failed_load_that_nobody_waits_for_is_removed(service: RegistrationService, fleet: Fleet) -> None:
    """Until it is known to have failed it is there, and says that it loads."""
    fleet.broken.add("probe.mar")
    fleet.may_load.clear()
    found = await service.register(RegisterRequest("probe.mar", options=ONE_WORKER), wait=False)
    assert found.is_loading
    fleet.may_load.set()
    await await_background(service)
    assert "probe" not in service.table
    assert fleet.front == {"probe": None}


@over_fleet
async def test_scaling_loads_and_unloads(service: RegistrationService, fleet: Fleet) -> None:
    """Workers are there when the answer is; without them the memory is free. A scale that fails changes nothing."""
    await service.register(RegisterRequest("probe.mar"), wait=True)
    await service.scale(ScaleRequest("probe", None, 2, 3), wait=True)
    await service.scale(ScaleRequest("probe", "1.5", 0, 0), wait=True)
    assert fleet.said == ["announce", "load probe.mar", "announce", "announce", "unload probe.mar"]
    fleet.broken.add("probe.mar")
    with pytest.raises(NotLoaded):
        await service.scale(ScaleRequest("probe", None, 1, 1), wait=True)
    assert service.table.find("probe").options.min_workers == 0
    fleet.may_load.clear()
    await service.scale(ScaleRequest("probe", None, 1, 1), wait=False)
    assert service.table.find("probe").is_loading
    fleet.may_load.set()
    await await_background(service)
    assert service.table.find("probe").options.min_workers == 0
    with pytest.raises(BadOption, match="max_worker cannot be less than min_worker"):
        await service.scale(ScaleRequest("probe", None, 2, 1), wait=True)


@over_fleet
async def test_archive_stays_loaded_for_others_that_serve_it(service: RegistrationService, fleet: Fleet) -> None:
    """Two names of one archive: the memory is freed with the last."""
    for name in ("a", "b"):
        await service.register(RegisterRequest("probe.mar", name=name, options=ONE_WORKER), wait=True)
    await service.unregister("a")
    assert "unload probe.mar" not in fleet.said
    await service.unregister("b")
    assert fleet.said[-2:] == ["announce", "unload probe.mar"]
    assert fleet.front == {"a": None, "b": None}
    with pytest.raises(ModelUnknown):
        await service.unregister("b")


@over_fleet
async def test_load_that_hangs_holds_no_other_up(service: RegistrationService, fleet: Fleet) -> None:
    """Others register and are removed meanwhile, and the end of the server does not wait for it."""
    fleet.may_load.clear()
    hanging = asyncio.create_task(service.register(RegisterRequest("probe.mar", options=ONE_WORKER), wait=True))
    await service.register(RegisterRequest("plain.mar"), wait=True)
    await service.register(RegisterRequest("plain.mar", name="later", options=ONE_WORKER), wait=False)
    await service.set_default("plain", "1.0")
    await service.unregister("plain")
    await service.close()
    assert not hanging.done()
    hanging.cancel()


@over_fleet
async def test_batching_is_told_before_the_load(service: RegistrationService, fleet: Fleet) -> None:
    """What a client says of batches goes before what the archive says, until that version is removed."""
    options = ServingOptions(1, 1, batch_size=4, says_batching=True)
    await service.register(RegisterRequest("probe.mar", options=options), wait=True)
    assert fleet.said == ["batch probe.mar 4", "unload probe.mar", "load probe.mar", "announce"]
    assert service.table.list_batching() == {"probe.mar": options.batching}
    await service.unregister("probe")
    assert fleet.said[4:] == ["announce", "batch probe.mar None", "unload probe.mar"]


@over_fleet
async def test_batching_ends_with_its_registration_also_where_the_archive_serves_on(
    service: RegistrationService, fleet: Fleet
) -> None:
    """Another name of the same archive would wait for batches that nobody asks for any more: it is loaded anew."""
    await service.register(RegisterRequest("probe.mar", name="plain", options=ONE_WORKER), wait=True)
    options = ServingOptions(1, 1, batch_size=4, says_batching=True)
    await service.register(RegisterRequest("probe.mar", name="batched", options=options), wait=True)
    fleet.said.clear()
    await service.unregister("batched")
    assert fleet.said == ["announce", "batch probe.mar None", "unload probe.mar"]
    fleet.said.clear()
    await service.register(RegisterRequest("probe.mar", name="third", options=ONE_WORKER), wait=True)
    fleet.said.clear()
    await service.unregister("third")
    assert fleet.said == ["announce"], "what has said nothing of batches leaves the archive loaded"
