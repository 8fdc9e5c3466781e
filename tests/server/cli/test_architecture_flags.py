"""`--architecture` names one architecture, an ensemble or the parts of a mixture."""

import re
from typing import Any

import pytest

from server.cli.architecture_flags import parse_architecture


@pytest.mark.parametrize(
    ("text", "config", "members", "stack", "found"),
    [
        ("", "{}", 1, False, ("", {})),
        ("", "{}", 3, False, ("", {"members": 3})),
        ("lear", '{"past_blocks": [0]}', 1, False, ("lear", {"past_blocks": [0]})),
        ("lear", "{}", 3, False, ("lear", {"members": 3})),
        ("lear:3", "{}", 1, False, ("lear", {"members": 3})),
        (
            "lear, lear:3,tcn",
            '{"tcn": {"channels": 8}}',
            1,
            True,
            (
                "mixture",
                {
                    "parts": [
                        {"architecture": "lear"},
                        {"architecture": "lear", "members": 3},
                        {"architecture": "tcn", "channels": 8},
                    ],
                    "stack": True,
                },
            ),
        ),
        (
            "lear,ddnn:2@linear",
            '{"ddnn": {"hidden": 8}}',
            1,
            False,
            (
                "mixture",
                {
                    "parts": [
                        {"architecture": "lear"},
                        {"architecture": "ddnn", "hidden": 8, "scaling": "linear", "members": 2},
                    ],
                    "stack": False,
                },
            ),
        ),
    ],
)
def test_names_become_an_architecture_and_its_config(
    text: str, config: str, members: int, found: tuple[str, dict[str, Any]], *, stack: bool
) -> None:
    """Of a mixture each part has the fields that the config gives to its name."""
    assert parse_architecture(text, config, members, stack=stack) == found


@pytest.mark.parametrize(
    ("text", "config", "members", "stack", "said"),
    [
        ("lear", "{}", 1, True, "--stack: name several architectures"),
        ("lear:0", "{}", 1, False, "a number of members from 1 to 64 after the colon"),
        ("lear:x", "{}", 1, False, "a number of members from 1 to 64 after the colon"),
        ("lear:3", "{}", 3, False, "it has 3 members already"),
        ("lear,", "{}", 1, False, "unknown architecture ''; known are"),
        ("lear,rnn", "{}", 1, False, "unknown architecture 'rnn'; known are"),
        ("lear,tcn", "{}", 3, False, "write how many each has, such as lear:3"),
        ("lear,tcn", '{"channels": 8}', 1, False, "expected an object by architecture"),
        ("lear,tcn", '{"tcn": 8}', 1, False, "expected an object such as"),
        ("lear,tcn", '{"tcn": {"members": 2}}', 1, False, "which other options set"),
        ("lear", "{", 1, False, "--config: not JSON"),
        ("lear@linear", "{}", 1, False, "@linear is for parts of a mixture; write --scaling linear"),
        ("lear,ddnn@asinh", "{}", 1, False, "expected @linear or nothing after it, not @asinh"),
        ("lear,ddnn@linear:2", "{}", 1, False, "expected @linear or nothing after it, not @linear:2"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, config: str, members: int, said: str, *, stack: bool) -> None:
    """In one line that names the flag."""
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_architecture(text, config, members, stack=stack)
