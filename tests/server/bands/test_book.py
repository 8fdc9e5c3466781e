"""The book: which version goes on with what was learnt, on whose clock prices come, and how many archives it has."""

import contextlib
import struct
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bands.adaptive_offsets import DAY, HOUR, BandShape
from server.bands.book import MOST_SHAPES, Book, Kept, NoSuchProduct, Price
from server.bands.market import AnsweredForecast, Outcome

SHAPE = BandShape((0.1, 0.5, 0.9), HOUR, "Europe/Berlin")
EPOCH = datetime.fromisoformat("1970-01-01")


def make_answer(
    day: int, *, model: str = "m", version: str = "v1", shape: BandShape = SHAPE, levels: int = 3
) -> AnsweredForecast:
    """A forecast of one day."""
    return AnsweredForecast(model, version, "", day, shape, day * DAY, struct.pack(f"<{levels}f", *range(levels)) * 24)


def find_day(text: str) -> int:
    """Days since 1970."""
    return (datetime.fromisoformat(text) - EPOCH).days


def test_a_version_of_the_same_shape_goes_on() -> None:
    """What was learnt of one version shifts the next; one with a calibration of its own begins at zero, and
    the first is there again after a rollback.
    """
    book = Book()
    book.note_forecast(make_answer(0), 10)
    book.pair("m", Price(0, False, 50.0))
    (record,) = book.records["m"]
    learnt = record.offsets
    assert any(learnt)
    book.note_forecast(make_answer(1, version="v2"), 10)
    assert len(book.records["m"]) == 1
    book.note_forecast(make_answer(2, shape=BandShape(SHAPE.levels, HOUR, SHAPE.time_zone, "calibrated")), 10)
    assert not any(book.records["m"][1].offsets)
    assert book.records["m"][0].offsets == learnt


def test_shapes_and_archives_are_bounded() -> None:
    """Of a third shape's coming the oldest goes; an archive beyond the limit has no record and costs others nothing."""
    book = Book()
    for day in range(5):
        book.note_forecast(make_answer(day, shape=BandShape(SHAPE.levels, HOUR, "UTC", str(day))), 2)
    assert [each.shape.calibration for each in book.records["m"]] == ["3", "4"]
    assert len(book.records["m"]) == MOST_SHAPES
    assert book.note_forecast(make_answer(0, model="n"), 2) == Kept.KEPT
    assert book.note_forecast(make_answer(0, model="o"), 2) == Kept.DROPPED
    assert book.note_forecast(make_answer(9, model="n", levels=3 * 500), 2) == Kept.DROPPED, "it is too long"
    assert set(book.records) == {"m", "n"}
    assert book.reset("m")
    assert not book.reset("m")
    assert book.note_forecast(make_answer(0, model="o"), 2) == Kept.KEPT


@pytest.mark.parametrize(
    ("utc", "slot"),
    [
        ("2026-01-10 23:00", "2026-01-11 00:00"),
        ("2026-07-10 22:00", "2026-07-11 00:00"),
        ("2026-10-25 00:00", "2026-10-25 02:00"),
        ("2026-10-25 01:00", "2026-10-25 02:00"),
    ],
)
def test_prices_with_an_offset_are_on_the_archives_clock(utc: str, slot: str) -> None:
    """In winter, in summer, and in the hour that comes twice, whose slot takes the first of the two prices."""
    book, wall = Book(), datetime.fromisoformat(slot)
    day = find_day(slot[:10])
    book.note_forecast(make_answer(day), 10)
    at = int((datetime.fromisoformat(utc) - EPOCH).total_seconds())
    assert book.pair("m", Price(at, True, 1.0)) == Outcome.PAIRED
    kept = book.records["m"][0].forecasts[0]
    assert list(kept.paired).index(1) == (wall - (EPOCH + timedelta(days=day))) // timedelta(hours=1)
    assert book.pair("m", Price(int((wall - EPOCH).total_seconds()), False, 2.0)) == Outcome.REPEATED


def test_what_no_clock_has_is_unmatched() -> None:
    """Times beyond the calendar, and archives that nobody knows."""
    book = Book()
    book.note_forecast(make_answer(0), 10)
    assert book.pair("m", Price(2**60, True, 1.0)) == Outcome.UNMATCHED
    assert book.pair("n", Price(0, True, 1.0)) == Outcome.UNMATCHED
    assert book.observed == [0, 0, 2]


def answer_products(day: int, *products: str, model: str = "lu", shape: BandShape = SHAPE) -> AnsweredForecast:
    """A forecast of one day of several products: the levels 0, 1 and 2 of the first, 10, 11 and 12 of the second."""
    levels = b"".join(struct.pack("<3f", *(10.0 * i + level for level in range(3))) * 24 for i in range(len(products)))
    return AnsweredForecast(model, "v1", "", day, shape, day * DAY, levels, products)


def test_each_product_learns_from_its_own_prices_alone() -> None:
    """Of two products one is observed: its offsets move by its own levels, the other's stay; its scores are its own.
    Prices that come again, or out of order, count once.
    """
    book = Book()
    assert book.note_forecast(answer_products(0, "energy", "reserve"), 10) == Kept.KEPT
    market = book.find_market("lu", "reserve")
    assert market == "lu#reserve"
    found = [book.pair(market, Price(hour * HOUR, False, 11.5)) for hour in (5, 3, 5)]
    assert found == [Outcome.PAIRED, Outcome.PAIRED, Outcome.REPEATED]
    (energy,), (reserve,) = book.records["lu#energy"], book.records["lu#reserve"]
    assert (energy.total, reserve.total, reserve.inside) == (0, 2, [2])
    assert not any(energy.offsets)
    assert any(reserve.offsets)
    assert book.forecasts == [2, 0, 0]
    assert book.note_forecast(answer_products(0, "energy", "reserve"), 10) == Kept.OVERLAPPING
    assert book.forecasts == [3, 1, 0], "the product that waits takes the last answer"


def test_prices_name_a_product_that_there_is() -> None:
    """Without a product, with a wrong one, or with one of an archive of one: each says what to do. Of an archive that
    nobody knows they are of no market.
    """
    book = Book()
    book.note_forecast(make_answer(0), 99)
    book.note_forecast(answer_products(0, *(f"p{i}" for i in range(12))), 99)
    wrong = {
        ("lu", ""): "lu has several products; name one as `product`: p0, p1, p2, p3, p4, p5, p6, p7, p8, p9 and 2 more",
        ("lu", "energy"): "lu has no product 'energy'; it has p0, p1,",
        ("m", "energy"): "m has one product, not 'energy' beside others; leave out `product`",
    }
    for (model, product), message in wrong.items():
        with pytest.raises(NoSuchProduct) as refused:
            book.find_market(model, product)
        assert message in str(refused.value)
    assert (book.find_market("m"), book.find_market("lu", "p11")) == ("m", "lu#p11")
    assert (book.find_market("n"), book.find_market("n", "energy")) == (None, None)


def test_an_archive_has_room_for_all_of_its_products_or_none() -> None:
    """Products count one by one. Where there is no room for a new version's third product, the two go on; it is a
    market once there is room. Products that a version has no more stay until the archive is forgotten.
    """
    book = Book()
    book.note_forecast(make_answer(0), 3)
    assert book.note_forecast(answer_products(0, "a", "b", "c"), 3) == Kept.DROPPED
    assert (set(book.records), book.products, book.forecasts) == ({"m"}, {}, [1, 0, 3])
    assert book.note_forecast(answer_products(0, "a", "b"), 3) == Kept.KEPT
    assert book.note_forecast(answer_products(1, "a", "b", "c"), 3) == Kept.DROPPED
    assert [len(book.records[f"lu#{product}"][0].forecasts) for product in "ab"] == [2, 2]
    assert set(book.records) == {"m", "lu#a", "lu#b"}
    book.note_forecast(answer_products(2, "c", "a"), 4)
    assert [len(book.records[f"lu#{product}"][0].forecasts) for product in "abc"] == [3, 2, 1]
    assert book.list_markets("lu") == ["lu#a", "lu#b", "lu#c"]
    too_long = AnsweredForecast("lu", "v1", "", 3, SHAPE, 3 * DAY, bytes(2 * 12 * 24 * 500), ("a", "b"))
    assert book.note_forecast(too_long, 4) == Kept.DROPPED
    assert book.reset("lu")
    assert (set(book.records), book.products) == ({"m"}, {})
    assert not book.reset("lu")


def test_an_archive_of_one_product_may_come_to_have_several() -> None:
    """Its record as one of one stays, and prices without a product are still of that; products have records of theirs,
    and all are forgotten together.
    """
    book = Book()
    book.note_forecast(make_answer(0), 10)
    book.note_forecast(answer_products(1, "a", "b", model="m"), 10)
    assert (book.find_market("m"), book.find_market("m", "b")) == ("m", "m#b")
    assert book.list_markets("m") == ["m", "m#a", "m#b"]
    with pytest.raises(NoSuchProduct, match="m has no product 'c'; it has a, b"):
        book.find_market("m", "c")
    assert book.reset("m")
    assert book.records == {}


def test_versions_of_other_shapes_have_records_by_product() -> None:
    """A version with its own calibration begins at zero for every product, and a rollback finds what was learnt."""
    book = Book()
    book.note_forecast(answer_products(0, "a", "b"), 10)
    book.pair("lu#a", Price(0, False, 50.0))
    learnt = book.records["lu#a"][0].offsets
    book.note_forecast(answer_products(1, "a", "b", shape=BandShape(SHAPE.levels, HOUR, "UTC", "new")), 10)
    assert [[any(each.offsets) for each in book.records[f"lu#{name}"]] for name in "ab"] == [[True, False], [False] * 2]
    book.note_forecast(answer_products(2, "a", "b"), 10)
    assert book.records["lu#a"][0].offsets == learnt
    assert len(book.records["lu#a"]) == 2


@pytest.mark.parametrize("alone_first", [True, False])
def test_a_name_with_the_mark_is_never_anothers_product(alone_first: bool) -> None:
    """An archive `lu#a` and the product `a` of `lu` would have one name: whichever came second has no record, and its
    prices are of no market.
    """
    book = Book()
    both = [make_answer(0, model="lu#a"), answer_products(0, "a", "b")]
    for answered, kept in zip(both if alone_first else both[::-1], (Kept.KEPT, Kept.DROPPED), strict=True):
        assert book.note_forecast(answered, 10) == kept
    markets = (book.find_market("lu#a"), book.find_market("lu", "a"))
    assert markets == (("lu#a", None) if alone_first else (None, "lu#a"))
    assert book.reset("lu#a") == alone_first


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["a", "a#x", "a#x#y", "b"]),
        st.sampled_from([(), ("x", "y"), ("y", "x#y"), ("x#y", "z", "x")]),
        st.sampled_from(["note", "note", "note", "pair", "reset"]),
    ),
    max_size=25,
)


@given(STEPS, st.integers(1, 6))
def test_every_record_is_one_archives_and_all_are_bounded(
    steps: list[tuple[str, tuple[str, ...], str]], most: int
) -> None:
    """Whatever comes in whatever order, with names that are made to be mistaken: each record belongs to one archive,
    a price moves the record of its own archive alone, and what is forgotten takes nothing of others along.
    """
    book, names = Book(), ["a", "a#x", "a#x#y", "b"]
    for day, (model, products, what) in enumerate(steps):
        before = {name: book.list_markets(name) for name in names}
        totals = {market: sum(each.total for each in records) for market, records in book.records.items()}
        if what == "note":
            alone = make_answer(day, model=model)
            book.note_forecast(answer_products(day, *products, model=model) if products else alone, most)
        elif what == "reset":
            assert book.reset(model) == bool(before[model])
        else:
            with contextlib.suppress(NoSuchProduct):
                market = book.find_market(model, products[0] if products else "")
                assert market is None or market in before[model]
                for at in range(day) if market else ():
                    book.pair(market or "", Price(at * DAY, False, 5.0))
                later = {name: sum(each.total for each in records) for name, records in book.records.items()}
                assert {name for name, total in later.items() if total > totals[name]} <= {market}
        after = {name: book.list_markets(name) for name in names}
        assert sorted(market for markets in after.values() for market in markets) == sorted(book.records)
        assert all(book.find_archive(market) == name for name, markets in after.items() for market in markets)
        assert len(book.records) <= most
        assert all(book.records.values())
        lost = {name for name in names if set(before[name]) - set(after[name])}
        assert lost <= ({model} if what == "reset" else set())
