"""Rollbacks, aliases, pinned versions and canaries of a running server; they survive its restart."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.models import Model, pack_forecaster
from tests.e2e.server import Answer, Load, Server, invoke, run_server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

NAME, ALIAS = "au/nsw1.mar", "nsw1@stable"
RELEASED = "fleetcast_release_requests_total"


class Market:
    """One archive with several versions: what each must answer."""

    def __init__(self, s3: S3Server, store: str) -> None:
        self._s3, self._store = s3, store
        self.right: dict[str, Model] = {}

    def publish(self, seed: int) -> str:
        """Replace the archive; the new version."""
        model = pack_forecaster(NAME, seed)
        version = upload(self._s3, self._store, [model])[NAME]
        self.right[version] = model
        return version

    def ask(self, server: Server, name: str, client: Any = None, seed: int = 0) -> str:
        """Ask by a name; the version that answered, whose numbers are checked."""
        question = next(iter(self.right.values())).question(seed)
        answer: Answer = invoke(client or server.client(), name, question.body)
        self.right[answer.version].question(seed).check(answer.body)
        return answer.version


def post(server: Server, path: str, body: Any = None) -> Any:
    """A management call that succeeds."""
    reply = server.http.post(f"{server.addresses['management']}/fleet/{path}", json=body)
    assert reply.is_success, reply.text
    return reply.json()


def test_a_rollback_is_one_call_and_survives_a_restart(s3: S3Server, store: str, tmp_path: Path) -> None:
    """Two versions have served; rolled back, the first answers at once, while the store has the second, and no client
    sees a failure; so it is after a restart without the store, until the model follows again. A second rollback has
    nothing to go back to (404), and no table is changed by it.
    """
    market = Market(s3, store)
    first = market.publish(1)
    start = partial(run_server, s3, tmp_path, f"s3://{store}", revalidate_s=600)
    with start(workers=2) as server:
        assert market.ask(server, NAME) == first
        wait_until(lambda: list_kept(server) == [first], "the first version is kept")
        assert server.http.post(f"{server.addresses['management']}/fleet/rollback/{NAME}").status_code == 404
        second = market.publish(2)
        post(server, f"reload/{NAME}")
        wait_until(lambda: list_kept(server) == [second, first], "both versions are kept")
        with Load(server, [market.right[second].question(0)], ask=partial(ask_as, market, server)) as load:
            load.more(10)
            rolled = post(server, f"rollback/{NAME}")
            assert rolled == {"model": NAME, "version": first, "served": [second]}
            assert market.ask(server, NAME) == first
            at = len(load.outcomes) + 3  # requests that were under way
            load.more(13)
        assert [outcome.problem for outcome in load.outcomes if outcome.problem] == []
        assert {outcome.version for outcome in load.outcomes[at:]} == {first}
        assert server.total(RELEASED, target=NAME, version=first, result="ok") > 10
        again = server.http.post(f"{server.addresses['management']}/fleet/rollback/{NAME}")
        assert (again.status_code, "is kept from before" in again.text) == (404, True)
    with s3.outage(store), start(pin=[NAME]) as server:
        assert market.ask(server, NAME) == first
        assert server.fleet("load", NAME).json()["version"] == first
        wait_until(lambda: is_pinned(server, f"{NAME}\\{first}"), "what a pinned name stands for is pinned")
        assert read_aliases(server) == {"aliases": [], "rollbacks": [{"model": NAME, "version": first}]}
        assert post(server, f"follow/{NAME}") == {"model": NAME, "held": first}
        assert market.ask(server, NAME) == second
        assert not is_pinned(server, f"{NAME}\\{first}")
        assert read_aliases(server) == {"aliases": [], "rollbacks": []}
        assert server.total(RELEASED, target=NAME) == 0


def test_an_alias_with_a_canary_serves_two_versions(s3: S3Server, store: str, tmp_path: Path) -> None:
    """A pinned alias keeps its version though the archive is replaced; with half of its requests for the new version
    both answer, and metrics count each; an alias that is removed, or of what cannot be, is refused.
    """
    market = Market(s3, store)
    old = market.publish(1)
    with run_server(s3, tmp_path, f"s3://{store}", revalidate_s=600) as server:
        market.ask(server, NAME)
        post(server, f"pin/{NAME}%5C{old}")
        assert post(server, f"alias/{ALIAS}", {"model": NAME, "version": old})["alias"] == ALIAS
        new = market.publish(2)
        post(server, f"reload/{NAME}")
        assert (market.ask(server, NAME), market.ask(server, ALIAS)) == (new, old)
        post(server, f"alias/{ALIAS}", {"model": NAME, "version": old, "canary": {"share": 0.5}})
        client = server.client()
        answered = [market.ask(server, ALIAS, client, seed=i) for i in range(40)]
        assert set(answered) == {old, new}
        assert server.total(RELEASED, target=ALIAS, version=old, result="ok") == answered.count(old) + 1
        assert server.total(RELEASED, target=ALIAS, version=new, result="ok") == answered.count(new)
        assert server.total("fleetcast_release_request_seconds_count", target=ALIAS, version=new) == answered.count(new)
        assert read_aliases(server)["aliases"] == [
            {"alias": ALIAS, "arms": [{"model": NAME, "version": old, "share": 0.5}, {"model": NAME, "share": 0.5}]}
        ]
        absent = server.http.post(
            f"{server.addresses['management']}/fleet/alias/x", json={"model": NAME, "version": "none"}
        )
        assert (absent.status_code, "is not kept on disk" in absent.text) == (404, True)
        removed = server.http.delete(f"{server.addresses['management']}/fleet/alias/{ALIAS}")
        assert removed.json() == {"alias": ALIAS, "removed": True}
        assert server.post(ALIAS).status_code == 400
        assert is_pinned(server, f"{NAME}\\{old}"), "an operator has pinned it, whatever the alias does"
        wait_until(lambda: server.said().count('"verb": "alias"') == 4, "the log says who set and removed aliases")


def list_kept(server: Server) -> list[str]:
    """The versions on disk, the one that served last first."""
    reply = server.http.get(f"{server.addresses['management']}/fleet/versions/{NAME}").json()
    return [each["version"] for each in reply["versions"]]


def is_pinned(server: Server, model: str) -> bool:
    """Whether a worker holds the model and never evicts it."""
    return any(holder.get("pinned") for holder in server.models().get(model, {"holders": []})["holders"])


def read_aliases(server: Server) -> Any:
    """The table."""
    return server.http.get(f"{server.addresses['management']}/fleet/aliases").json()


def ask_as(market: Market, server: Server, question: Any, client: Any) -> Answer:
    """For `Load`: an answer that is right for the version that it names."""
    del server
    answer = invoke(client, question.model, question.body)
    market.right[answer.version].question(0).check(answer.body)
    return answer
