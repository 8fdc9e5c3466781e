"""Which calls are tables, and which answers: by their content type, and by what is accepted."""

import pytest

from server.contract import JSON, NPY
from server.errors import Refused, Situation
from server.front.columns.arrow_reader import ARROW
from server.front.columns.table_calls import choose_answer, find_table


@pytest.mark.parametrize(
    ("sent", "accept", "call", "answer"),
    [
        (JSON, "", None, None),
        ("", "*/*", None, None),
        ("text/plain", "", None, None),
        (JSON, ARROW, None, ARROW),
        (JSON, NPY, None, NPY),
        (ARROW, "", ARROW, ARROW),
        (NPY, "", NPY, NPY),
        (f"{NPY.upper()}; x=y", "*/*", NPY, NPY),
        (NPY, ARROW, NPY, ARROW),
        (ARROW, f"{NPY}, */*;q=0.1", ARROW, NPY),
        (NPY, JSON, NPY, None),
        (ARROW, JSON, ARROW, None),
    ],
)
def test_what_is_sent_is_what_comes_back_unless_it_is_named(
    sent: str, accept: str, call: str | None, answer: str | None
) -> None:
    """Each of three encodings may be answered by each."""
    assert find_table(sent) == call
    assert choose_answer(sent, accept) == answer


@pytest.mark.parametrize("sent", ["application/x-npz", "application/x-npy2", "application/vnd.apache.arrow.file"])
def test_what_is_nearly_a_table_is_refused(sent: str) -> None:
    """It would be no JSON; the message names what is taken."""
    with pytest.raises(Refused, match=NPY) as caught:
        find_table(sent)
    assert (caught.value.situation, caught.value.detail.field) == (Situation.UNSUPPORTED_CODING, "content-type")
    with pytest.raises(Refused, match=NPY):
        choose_answer(sent, "")
