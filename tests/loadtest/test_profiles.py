"""Load profiles: seeded, and distributed as they say."""

import numpy as np
import pytest

from loadtest.profiles import Arrivals, Profile, constant, poisson, zipf


def test_the_same_seed_gives_the_same_schedule() -> None:
    """To the last bit; another seed or part gives another."""
    profile = Profile(50, 100.0, seed=3)
    first, again = profile.schedule(10), profile.schedule(10)
    assert first.at.tobytes() == again.at.tobytes()
    assert first.model.tobytes() == again.model.tobytes()
    for other in (Profile(50, 100.0, seed=4).schedule(10), profile.schedule(10, part=1)):
        assert first.at[:50].tolist() != other.at[:50].tolist()
        assert first.model[:50].tolist() != other.model[:50].tolist()


def test_schedules_stay_as_they_were() -> None:
    """A recorded seed can be repeated later: these values may only change together with a note in the change log."""
    schedule = Profile(200, 200.0).schedule(15)
    assert len(schedule.at) == 3078
    assert schedule.at[:3] == pytest.approx(
        [0.0004970171843787785, 0.0015229793812360226, 0.00263549656823181], rel=1e-12
    )
    assert schedule.model[:6].tolist() == [23, 80, 99, 23, 23, 50]


def test_the_warm_up_loads_the_same_popular_models() -> None:
    """Parts of a profile differ in their draws, not in who is popular."""
    profile = Profile(100, 1000.0, zipf=1.2)
    favourites = [np.bincount(profile.schedule(20, part).model).argmax() for part in (0, 1)]
    assert favourites[0] == favourites[1]


def test_constant_arrivals_are_a_metronome() -> None:
    """The first is due at once, the others 1 / rate apart, none after the end."""
    at = constant(200.0, 2.0)
    assert (len(at), at[0]) == (400, 0.0)
    assert np.diff(at) == pytest.approx(1 / 200)
    assert at[-1] < 2.0
    assert Profile(1, 200.0, arrivals=Arrivals.CONSTANT).schedule(2.0).at.tolist() == at.tolist()


def test_poisson_arrivals_are_independent() -> None:
    """Their number varies as a Poisson number does, and the gaps are exponential: as wide as their mean."""
    rng = np.random.default_rng(0)
    runs = [poisson(100.0, 10.0, rng) for _ in range(200)]
    counts = np.array([len(at) for at in runs])
    assert counts.mean() == pytest.approx(1000, abs=5 * np.sqrt(1000 / 200))
    assert counts.var() == pytest.approx(1000, rel=0.4)
    gaps = np.concatenate([np.diff(at) for at in runs])
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert all(at[0] >= 0 and at[-1] < 10 for at in runs)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.3])
def test_popularity_falls_with_the_rank(exponent: float) -> None:
    """Sorted, it is 1 / rank ** exponent; as asked, the popular are spread over the fleet."""
    found = zipf(500, exponent, np.random.default_rng(1))
    ranked = np.sort(found)[::-1]
    assert found.sum() == pytest.approx(1)
    assert ranked / ranked[0] == pytest.approx(np.arange(1, 501) ** -exponent)
    assert exponent == 0 or found.tolist() != ranked.tolist()


def test_models_are_asked_as_often_as_they_are_popular() -> None:
    """Draws follow the probabilities, within five standard deviations for every model."""
    schedule = Profile(20, 1000.0, zipf=1.0, seed=9).schedule(100)
    shares = np.sort(np.bincount(schedule.model, minlength=20))[::-1] / len(schedule.model)
    wanted = np.arange(1, 21) ** -1.0 / (np.arange(1, 21) ** -1.0).sum()
    assert (abs(shares - wanted) < 5 * np.sqrt(wanted / len(schedule.model))).all()


@pytest.mark.parametrize(
    ("profile", "seconds"),
    [(Profile(10, 1.0), 2.0), (Profile(10, 1e6), 3600.0), (Profile(0, 100.0), 10.0), (Profile(10, 100.0, -1.0), 10.0)],
)
def test_senseless_loads_are_refused(profile: Profile, seconds: float) -> None:
    """Too few or too many requests, no models, popularity that rises with the rank: said with the numbers given."""
    with pytest.raises(ValueError, match=f" requests/s for {seconds:g} s over {profile.models} models"):
        profile.schedule(seconds)
