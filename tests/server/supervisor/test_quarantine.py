"""The quarantine of the server: which models enter it by deaths of workers, and which leave it."""

from server.ipc.pulse import How, RunningModel
from server.supervisor.quarantine import WINDOW_S, ServerQuarantine


def list_running(*models: str, how: How = "batch") -> list[RunningModel]:
    """What a worker ran."""
    return [RunningModel(model, how) for model in models]


def test_two_deaths_are_needed() -> None:
    """The model that ran both times, at last with no other, is refused; a release forgets deaths."""
    quarantine = ServerQuarantine()
    assert not quarantine.note_death(list_running("a.mar", "b.mar"))
    assert quarantine.note_death(list_running("a.mar"))
    assert quarantine.reasons == {"a.mar": "2 workers died while it ran"}
    assert quarantine.release("a.mar")
    assert not quarantine.release("a.mar")
    assert not quarantine.note_death(list_running("a.mar"))


def test_what_ran_beside_others_is_not_blamed_for_all() -> None:
    """Models of one tick are in every batch: three deaths make none of them guilty, unless it was on trial."""
    quarantine = ServerQuarantine()
    for _ in range(3):
        assert not quarantine.note_death(list_running("a.mar", "b.mar", "c.mar"))
    assert not quarantine.note_death(list_running("a.mar", "b.mar", "c.mar"), tried="other.mar")
    assert quarantine.note_death(list_running("a.mar", "b.mar", "c.mar"), tried="b.mar")
    assert set(quarantine.reasons) == {"b.mar"}


def test_a_first_death_that_is_noted_during_the_trial_is_no_verdict() -> None:
    """A front may ask for the trial before the supervisor has noted the death that made the model a suspect."""
    quarantine = ServerQuarantine()
    assert not quarantine.note_death(list_running("a.mar"), tried="a.mar")
    assert quarantine.note_death(list_running("a.mar", "b.mar"), tried="a.mar")


def test_one_of_two_is_found_without_a_trial() -> None:
    """Half of four deaths is as much as two deaths."""
    quarantine = ServerQuarantine()
    found = [quarantine.note_death(list_running("a.mar", other)) for other in ("b.mar", "c.mar", "d.mar", "e.mar")]
    assert found == [False, False, False, True]
    assert set(quarantine.reasons) == {"a.mar"}


def test_a_kill_from_outside_blames_no_rows() -> None:
    """Workers that an operator or the kernel killed ran rows and loads by chance; a model that ran alone may be why."""
    quarantine = ServerQuarantine()
    for _ in range(3):
        assert not quarantine.note_death(list_running("a.mar") + list_running("b.mar", how="load"), from_outside=True)
    assert not quarantine.note_death(list_running("c.mar", how="alone"), from_outside=True)
    assert quarantine.note_death(list_running("c.mar", how="alone"), from_outside=True)


def test_deaths_long_ago_do_not_count() -> None:
    """Two deaths that are more than an hour apart are chance."""
    now = [0.0]
    quarantine = ServerQuarantine(lambda: now[0])
    quarantine.note_death(list_running("a.mar"))
    now[0] = WINDOW_S + 1
    assert not quarantine.note_death(list_running("a.mar"))


def test_blame_ends_when_the_culprit_is_found() -> None:
    """Whatever ran when a worker died of its own is blamed until a death shows who did it; a kill blames no rows."""
    quarantine = ServerQuarantine()
    quarantine.note_death(list_running("killed.mar"), from_outside=True)
    quarantine.note_death(list_running("culprit.mar", "beside.mar"))
    assert [quarantine.is_blamed(name) for name in ("killed.mar", "culprit.mar", "beside.mar")] == [False, True, True]
    assert quarantine.note_death(list_running("culprit.mar", "other.mar"), tried="culprit.mar")
    assert not any(quarantine.is_blamed(name) for name in ("culprit.mar", "beside.mar", "other.mar"))
    quarantine.note_death(list_running("beside.mar"))
    quarantine.release("beside.mar")
    assert not quarantine.is_blamed("beside.mar")
