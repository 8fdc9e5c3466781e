"""How long an answer may take: both servers' time-outs and those of single models. Pure."""

from server.offline.migration.configuration import Configuration
from server.offline.migration.models import read_model_records
from server.offline.migration.outcome import Outcome, become

DEFAULT_S = 120  #: of both servers


def parse_whole_number(text: str, *, least: int, most: int = 2**63) -> int:
    """A whole number. Raises ValueError that says what it is not."""
    try:
        number = int(text)
    except ValueError:
        raise ValueError("it is no whole number, and the old server does not start with it") from None
    if not least <= number <= most:
        raise ValueError(f"it is less than {least}" if number < least else f"it is more than {most}")
    return number


def set_timeouts(config: Configuration) -> Outcome:
    """The longest time-out of all, as it is one for all models here; a request's deadline must not be shorter.

    Raises ValueError.
    """
    given = config.get("default_response_timeout_seconds") or config.get("default_response_timeout")
    default = parse_whole_number(given, least=1) if given else DEFAULT_S
    single = [record.response_timeout for record in read_model_records(config) if record.response_timeout]
    longest = float(max([default, *single]))
    why = "the longest of all models', as there is one for all here" if max([default, *single]) > default else ""
    return become({"code_timeout_s": longest, "request_timeout_s": longest}, why)
