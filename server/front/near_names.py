"""Names that a client may have meant by one that no archive has. Pure.

Only names that a front has seen answer are looked at, so many and no more, because a client can ask for what is not
there as often as it likes.
"""

from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import islice

MOST_LOOKED_AT = 512  #: names, about half a millisecond
MOST_COMPARED = 32  #: names whose likeness is calculated, 30 us each
MOST_NAMED = 3
LONGEST = 200  #: characters of a name that is compared: the time grows with their square
LENGTHS_DIFFER, LEAST_LIKENESS = 4, 0.8
_ENDINGS = (".mar", ".tar.gz", ".zip")


def find_near_names(wanted: str, known: Iterable[str]) -> list[str]:
    """The names that differ from `wanted` in case, ending or folder only, then those that look like it."""
    if len(wanted) > LONGEST:
        return []
    stem, best, alike = _find_stem(wanted), list[str](), list[str]()
    last = stem.rpartition("/")[2]
    for name in islice(known, MOST_LOOKED_AT):
        found = _find_stem(name)
        if found == stem or found.rpartition("/")[2] == last:
            best.append(name)
        elif abs(len(found) - len(stem)) <= LENGTHS_DIFFER and len(alike) < MOST_COMPARED and found[:1] == stem[:1]:
            alike.append(name)
    scored = ((SequenceMatcher(None, stem, _find_stem(name)).ratio(), name) for name in alike if len(best) < MOST_NAMED)
    best += [name for score, name in sorted(scored, reverse=True) if score >= LEAST_LIKENESS]
    return best[:MOST_NAMED]


def _find_stem(name: str) -> str:
    """The name in lower case, without the ending of an archive."""
    lower = name.casefold()
    return next((lower.removesuffix(ending) for ending in _ENDINGS if lower.endswith(ending)), lower)
