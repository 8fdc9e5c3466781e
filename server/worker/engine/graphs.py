"""The captured forwards of a device's engine. Requests run eagerly until a graph was captured in idle time.

On the step thread. A forward is watched before it is captured: work for which the host waits is never captured,
because a capture that fails is costly to contain. Watching and capturing are a piece of idle time each.
"""

from collections import OrderedDict
from collections.abc import Callable

import structlog
import torch

from handlers.base import Family
from server.worker.engine.capture import HostReads, NotCapturable
from server.worker.engine.device import Device
from server.worker.engine.device_errors import is_lost
from server.worker.engine.graph_choice import Key, RecentRuns, choose_victims
from server.worker.engine.staging import DeviceStaging

MOST_PLAIN = 1024  #: families that are remembered as not to be captured: an archive's author chooses its family

Forward = Callable[[], torch.Tensor]

log = structlog.get_logger()


class Graphs:
    """See the module. INVARIANT: a graph's staging is among the engine's; `forget` is told before it goes."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._graphs: OrderedDict[Key, Forward] = OrderedDict()  # the least recently used first
        self._sizes: dict[Key, int] = {}  # bytes that each keeps
        self._runs = RecentRuns()
        self._eager: dict[Key, DeviceStaging] = {}  # forwards that ran without a graph since they were looked at
        self._watched = set[Key]()  # those among them that may be captured
        self._plain = dict[str, str]()  # why a family's forwards are not captured, for good

    def __repr__(self) -> str:
        """For example `<Graphs: 7, of <RecentRuns of 12 forwards>>`."""
        return f"<Graphs: {len(self)}, of {self._runs!r}>"

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Key) -> bool:
        return key in self._graphs

    def find_forward(self, staging: DeviceStaging, bucket: int) -> Forward:
        """The graph of this family and bucket, or its plain forward; to be called in launched work."""
        key = staging.family.key, bucket
        if key[0] in self._plain:
            return staging.forward(bucket)
        self._runs.record(key)
        known = self._graphs.get(key)
        if known is None:
            self._eager[key] = staging
            return staging.forward(bucket)
        self._graphs.move_to_end(key)
        return known

    def prepare_next(self) -> bool:
        """Watch or capture the next forward that deserves a graph. False: there is none.

        It overwrites staging, so no forward may be in flight. Raises torch.OutOfMemoryError; the forward then has to
        run as often as a new one.
        """
        held = {key: self._sizes[key] for key in self._graphs}
        while self._eager:
            key = next(iter(self._eager))
            staging = self._eager.pop(key)
            size = staging.count_graph_bytes(key[1])
            victims = choose_victims(key, size, self._runs, held)
            if victims is None or key[0] in self._plain:
                continue
            try:
                if key in self._watched:
                    self._capture(key, staging, size, victims)
                else:
                    self._watch(key, staging)
            except torch.OutOfMemoryError:
                self._runs.forget(key)
                raise
            return True
        return False

    def captured(self, family: str) -> set[int]:
        """The buckets of a family that have graphs, whose bindings have to stay."""
        return {bucket for key, bucket in self._graphs if key == family}

    def forget(self, family: str | None = None) -> None:
        """Drop what uses the staging of a family, or of all; what runs often is captured again."""
        for key in [key for key in (*self._graphs, *self._eager, *self._watched) if family in (None, key[0])]:
            self._graphs.pop(key, None)
            self._sizes.pop(key, None)
            self._eager.pop(key, None)
            self._watched.discard(key)

    def _watch(self, key: Key, staging: DeviceStaging) -> None:
        """Run it eagerly on zeros, which are legal inputs, and look for what a capture would fail of."""
        forward, watch = staging.forward(key[1]), HostReads(self._device.where)

        def work() -> None:
            staging.clear(key[1])
            with watch:
                forward()

        try:
            self._device.launch(work).synchronize()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if is_lost(error):
                raise
            self._run_plainly(staging.family, str(error))
            return
        if watch.found:
            self._run_plainly(staging.family, f"{watch.found} waits for the device or reads the host's memory")
            return
        self._watched.add(key)
        self._eager[key] = staging

    def _capture(self, key: Key, staging: DeviceStaging, size: int, victims: list[Key]) -> None:
        self._watched.discard(key)
        try:
            self._graphs[key] = self._device.graph(staging.forward(key[1]))
        except NotCapturable as error:
            self._run_plainly(staging.family, str(error))
            return
        self._sizes[key] = size
        for victim in victims:
            del self._graphs[victim], self._sizes[victim]

    def _run_plainly(self, family: Family, why: str) -> None:
        """Capture no forward of this family any more; outlives `forget`."""
        log.warning("runs_without_graph", family=family.key, error=why)
        if len(self._plain) >= MOST_PLAIN:
            self._plain.clear()
        self._plain[family.key] = why
