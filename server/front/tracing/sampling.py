"""Which requests are traced: OpenTelemetry's samplers by name, and a bound on traces a second. Pure.

A sampler asks the client's own decision first where it is `parentbased`; so a trace is whole or not there. The bound
holds for all of them: whoever sends the sampled flag with each request does not decide what tracing costs.
"""

from collections.abc import Callable
from typing import Final

from server.front.tracing.trace_context import TraceParent

ALWAYS: Final = "parentbased_always_on"
#: Each sampler's name: whether it follows the client's decision, and the share that it takes; None: the argument says.
SAMPLERS: Final[dict[str, tuple[bool, float | None]]] = {
    "always_on": (False, 1.0),
    "always_off": (False, 0.0),
    "traceidratio": (False, None),
    ALWAYS: (True, 1.0),
    "parentbased_always_off": (True, 0.0),
    "parentbased_traceidratio": (True, None),
}
BURST_S: Final = 5.0  #: of the traces a second that are allowed, so many seconds' may come at once
_ID_BITS: Final = 64


class Sampler:
    """Decides by the client's decision and the trace's id, as all parts of a distributed system do alike."""

    def __init__(self, *, follows_parent: bool, ratio: float) -> None:
        self.follows_parent, self.ratio = follows_parent, ratio
        self._bound = round(ratio * (1 << _ID_BITS))

    def __repr__(self) -> str:
        """For example `<Sampler 0.1 of requests, others as their clients decided>`."""
        return f"<Sampler {self.ratio:g} of requests{', others as their clients decided' * self.follows_parent}>"

    def wants(self, parent: TraceParent | None, trace_id: str) -> bool:
        """Whether the request is traced."""
        if parent is not None and self.follows_parent:
            return parent.is_sampled
        return int(trace_id[16:], 16) < self._bound


class TraceBudget:
    """At most `per_second` traces on average. `now`: the monotonic clock in seconds."""

    def __init__(self, per_second: float, now: Callable[[], float]) -> None:
        self._per_second, self._most = per_second, max(1.0, per_second * BURST_S)
        self._left, self._now, self._at = self._most, now, now()

    def __repr__(self) -> str:
        """For example `<TraceBudget 20 a second, 100 left>`."""
        return f"<TraceBudget {self._per_second:g} a second, {self._left:.0f} left>"

    def take(self) -> bool:
        """Whether one more may begin now."""
        now = self._now()
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def read_sampler(name: str, argument: str) -> Sampler:
    """The sampler that OTEL_TRACES_SAMPLER names. Raises ValueError."""
    found = SAMPLERS.get(name)
    if found is None:
        raise ValueError(f"OTEL_TRACES_SAMPLER: {name[:80]!r} is none of {', '.join(SAMPLERS)}")
    follows_parent, ratio = found
    return Sampler(follows_parent=follows_parent, ratio=_read_ratio(argument) if ratio is None else ratio)


def _read_ratio(argument: str) -> float:
    if not argument:
        return 1.0  # OpenTelemetry's default
    try:
        ratio = float(argument)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ValueError(f"OTEL_TRACES_SAMPLER_ARG: {argument[:80]!r} is no number from 0 to 1")
    return ratio
