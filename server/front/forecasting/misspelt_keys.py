"""Keys of a body that look like one that its protocol has. Pure.

Protocols that let unknown keys through do so for keys to come. One that differs from a known key by a letter or two is
misspelt, and must not be left out in silence.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import msgspec

from server.errors import Refused, Situation

LEAST_LIKENESS = 0.8
LONGEST = 40  #: characters of a key that is compared, as long as any known one is
MOST_KEYS = 200  #: of one object that are looked at: a comparison takes some 30 us
_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def cut_keys(body: bytes | msgspec.Raw) -> Mapping[str, msgspec.Raw]:
    """The keys of an object with their values uncut; none for what is no object."""
    try:
        return _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}


def refuse_misspelt(keys: Iterable[str], known: Iterable[str], place: str = "") -> None:
    """Raises Refused for the first key that looks like a known one and is none. `place`: of the object, with a dot."""
    names = list(known)
    for _, key in zip(range(MOST_KEYS), keys, strict=False):
        if key in names or len(key) > LONGEST:
            continue
        near = get_close_matches(key, names, 1, LEAST_LIKENESS)
        if near:
            message = f"there is no such key; did you mean {near[0]}?"
            raise Refused(Situation.BAD_REQUEST, message, field=f"{place}{key}")
