"""Which models are refused by every worker until an operator releases them. It lives as long as the server."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import structlog

from server.ipc.pulse import RunningModel

DEATHS = 2  #: of workers, while they ran the model
WINDOW_S = 3600.0  #: deaths longer ago than this do not count
MOST = 4096  #: models in quarantine, and models that deaths are counted of; beyond it the oldest are released

log = structlog.get_logger()


class ServerQuarantine:
    """Reasons by model, and the deaths of workers by the models they ran. `now`: the monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.reasons: dict[str, str] = {}
        self._deaths: Counter[str] = Counter()
        self._blamed: set[str] = set()
        self._shares: defaultdict[str, float] = defaultdict(float)
        self._since, self._now = now(), now

    def __repr__(self) -> str:
        """For example `<ServerQuarantine 1 models>`."""
        return f"<ServerQuarantine {len(self.reasons)} models>"

    def add(self, model: str, why: str) -> None:
        """Refuse the model from now on."""
        while len(self.reasons) >= MOST:
            del self.reasons[next(iter(self.reasons))]
        self.reasons[model] = why
        log.error("quarantined", model=model, why=why)

    def release(self, model: str) -> bool:
        """Let the model run again. False if it was not in quarantine."""
        self._deaths.pop(model, None)
        self._blamed.discard(model)
        self._shares.pop(model, None)
        return self.reasons.pop(model, None) is not None

    def is_blamed(self, model: str) -> bool:
        """Whether a worker has died of its own while the model ran, and no culprit has been found since."""
        return model in self._blamed

    def list_suspects(self) -> list[str]:
        """Models that are refused, or of which a worker may have died."""
        return sorted(self._blamed.union(self.reasons))

    def note_death(self, running: Sequence[RunningModel], *, tried: str = "", from_outside: bool = False) -> bool:
        """Count a worker's death against the models that ran. True if one of them is refused now.

        A model is refused at its second death, where it ran with no other or was on trial (`tried`), or when its shares
        of deaths, one divided by the models that ran, make DEATHS. A kill from outside says nothing of rows, whose
        arithmetic is ours, nor of loads: they ran there by chance.
        """
        if self._now() - self._since > WINDOW_S or len(self._deaths) > MOST:
            self._deaths.clear()
            self._blamed.clear()
            self._shares.clear()
            self._since = self._now()
        found = False
        named = {each.model for each in running if not from_outside or each.how == "alone"}
        self._blamed |= named
        for model in sorted(named):
            self._deaths[model] += 1
            self._shares[model] += 1 / len(named)
            again = self._deaths[model] >= DEATHS and (len(named) == 1 or model == tried)
            if (again or self._shares[model] >= DEATHS) and model not in self.reasons:
                self.add(model, f"{self._deaths[model]} workers died while it ran")
                found = True
        if found:
            self._blamed.clear()
        return found
