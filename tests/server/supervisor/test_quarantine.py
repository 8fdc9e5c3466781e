"""The quarantine of the server: which models enter it by deaths of workers, and which leave it."""

from server.supervisor.quarantine import WINDOW_S, ServerQuarantine


def test_two_deaths_are_needed() -> None:
    """The model that ran both times is refused, one that ran once is not; a release forgets deaths."""
    quarantine = ServerQuarantine()
    assert not quarantine.note_death(["a.mar", "b.mar"])
    assert quarantine.note_death(["a.mar"])
    assert quarantine.reasons == {"a.mar": "2 workers died while it ran"}
    assert quarantine.release("a.mar")
    assert not quarantine.release("a.mar")
    assert not quarantine.note_death(["a.mar"])


def test_deaths_long_ago_do_not_count() -> None:
    """Two deaths that are more than an hour apart are chance."""
    now = [0.0]
    quarantine = ServerQuarantine(lambda: now[0])
    quarantine.note_death(["a.mar"])
    now[0] = WINDOW_S + 1
    assert not quarantine.note_death(["a.mar"])
