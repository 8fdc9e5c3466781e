"""W3C Trace Context: what is valid is read as it is, and what is not is as if it had not been sent."""

import pytest
from hypothesis import given, strategies

from server.front.tracing.trace_context import TraceParent, read_trace_parent, read_trace_state

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01".encode()


def test_a_valid_header_is_the_clients_span() -> None:
    """With its flag and its state; unknown flags and spaces around it change nothing."""
    assert read_trace_parent({b"traceparent": VALID}) == TraceParent(TRACE, SPAN, is_sampled=True)
    assert read_trace_parent({b"traceparent": VALID[:-1] + b"2"}) == TraceParent(TRACE, SPAN, is_sampled=False)
    assert read_trace_parent({b"traceparent": b" " + VALID[:-2] + b"ff\t"}) == TraceParent(TRACE, SPAN, is_sampled=True)
    found = read_trace_parent({b"traceparent": VALID, b"tracestate": b"a=1,b@c=2"})
    assert found == TraceParent(TRACE, SPAN, True, "a=1,b@c=2")


def test_a_later_version_may_say_more() -> None:
    """Version 00 is exactly so long; a later one may have fields behind."""
    assert read_trace_parent({b"traceparent": b"cc" + VALID[2:] + b"-what-else"}) is not None
    assert read_trace_parent({b"traceparent": b"cc" + VALID[2:]}) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"01",
        VALID + b"-more",
        VALID.upper(),
        VALID[:-1],
        b"ff" + VALID[2:],
        f"00-{'0' * 32}-{SPAN}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        f"00-{TRACE}-{SPAN}-0g".encode(),
        f"00_{TRACE}-{SPAN}-01".encode(),
        VALID + b"x",
        b"cc" + VALID[2:] + b"." + b"x" * 10,
        b"cc" + VALID[2:] + b"-" + b"x" * 1000,
        b"\xff" * 55,
    ],
)
def test_a_malformed_header_is_none(wrong: bytes) -> None:
    """Nothing that is wrong is an error."""
    assert read_trace_parent({b"traceparent": wrong}) is None


@given(strategies.binary(max_size=300))
def test_no_bytes_raise(raw: bytes) -> None:
    """Whatever a stranger sends is read, or is none."""
    found = read_trace_parent({b"traceparent": raw, b"tracestate": raw})
    assert found is None or len(found.trace_id) == 32
    assert len(read_trace_state(raw)) <= len(raw)


def test_a_state_is_passed_on_or_left_out_as_a_whole() -> None:
    """Empty members are skipped; a wrong key or value, a key twice, or too much leaves none."""
    assert read_trace_state(b"rojo=00f067aa0ba902b7 , congo=t61rcWkgMzE,,") == "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"
    for wrong in (
        b"A=1",
        b"a",
        b"a=1,a=2",
        b"a=\x01",
        b"=1",
        b"a=" + b"x" * 600,
        b",".join(b"k%d=1" % i for i in range(33)),
    ):
        assert read_trace_state(wrong) == ""
    assert read_trace_state(b",".join(b"k%d=1" % i for i in range(32))).count("=") == 32
