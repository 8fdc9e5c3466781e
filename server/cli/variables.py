"""Finds variables `FLEETCAST_...` that are no setting: a mistyped one must not silently leave the default. Pure."""

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

PREFIX = "FLEETCAST_"
#: Variables that are no settings: a client's token, and what this project's own tests and benchmarks read.
OTHERS = frozenset({"TOKEN", "TEST_S3", "TEST_RAY", "FUZZ_S", "FUZZ_SEED", "QUIET", "DATA"})
#: What Kubernetes sets in each pod for a service `fleetcast...`, unless `enableServiceLinks: false`.
_SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+", re.IGNORECASE)
ADVICE = "Kubernetes sets it after a service of that name: put `enableServiceLinks: false` into the pod's spec"
SIMILAR = 0.75  #: least similarity of a name that is suggested, as `difflib` counts it


def explain_unknown_variables(variables: Mapping[str, str], settings: Collection[str]) -> Iterator[str]:
    """Say of each variable with our prefix that is no setting what was probably meant.

    What Kubernetes sets after a service is passed over: nobody has typed it.
    """
    known = {name.upper() for name in settings}
    for name, value in sorted(variables.items()):
        short = name.upper().removeprefix(PREFIX)
        if short == name.upper() or short in known or short in OTHERS or is_service_link(name, value):
            continue
        yield f"there is no variable {name}{suggest_name(short, sorted(known | {'TOKEN'}), PREFIX)}"


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes has set the variable after a service."""
    short = name.upper().removeprefix(PREFIX)
    return bool(_SERVICE_LINK.fullmatch(short) or (short.endswith("PORT") and _SERVICE_ADDRESS.fullmatch(value)))


def suggest_name(given: str, known: Collection[str], prefix: str = "") -> str:
    """The question `; did you mean ...?` with the most similar names, empty where none is similar.

    A name that ends with the given words is similar: who says PORT may mean INFERENCE_PORT.
    """
    near = get_close_matches(given, known, n=2, cutoff=SIMILAR)
    longer = [name for name in known if name.endswith(f"_{given}")]
    found = dict.fromkeys(f"{prefix}{name}" for name in [*near, *longer][:3])
    return f"; did you mean {' or '.join(found)}?" if found else ""
