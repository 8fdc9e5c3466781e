"""The table of nodes: what may stand in the file, and that a bad one changes nothing."""

import os
from pathlib import Path

import pytest

from server.front.nodes.membership import MAX_FILE_BYTES, NodesFile, number_node, parse_nodes

GOOD = b'{"nodes": [{"name": "a", "address": "127.0.0.1:7000"}, {"name": "b/1", "address": "[::1]:7001"}]}'


def test_nodes_are_known_by_number() -> None:
    """The number follows from the name alone; unknown fields of later versions are passed over."""
    table = parse_nodes(GOOD.replace(b'"a",', b'"a", "later": 1,'))
    assert {node.name for node in table.values()} == {"a", "b/1"}
    assert table[number_node("a")].address == "127.0.0.1:7000"
    assert len({number_node(f"node-{i}") for i in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "truncated"),
        (b"[]", "object"),
        (GOOD.replace(b"b/1", b"a"), "two nodes have one name"),
        (GOOD.replace(b":7000", b""), "address"),
        (GOOD.replace(b'"a"', b'""'), "name"),
        (GOOD.replace(b'"a"', b'"a b"'), "name"),
    ],
)
def test_a_bad_table_says_what_is_wrong(raw: bytes, why: str) -> None:
    """Each fault has its reason."""
    with pytest.raises(ValueError, match=why):
        parse_nodes(raw)


def test_a_file_is_read_when_it_changes_and_kept_while_it_is_bad(tmp_path: Path) -> None:
    """A missing, bad or huge file gives nothing, and a good one that follows is taken."""
    file = tmp_path / "nodes.json"
    nodes = NodesFile(file)
    assert nodes.read_changes() is None
    file.write_bytes(GOOD)
    assert len(nodes.read_changes() or {}) == 2
    assert nodes.read_changes() is None
    file.write_bytes(b"{")
    assert nodes.read_changes() is None
    file.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    assert nodes.read_changes() is None
    draft = tmp_path / "new"
    draft.write_bytes(GOOD)
    os.replace(draft, file)  # noqa: PTH105 -- what a writer does
    assert len(nodes.read_changes() or {}) == 2
