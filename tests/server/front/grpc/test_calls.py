"""Calls by gRPC before a worker that answers as a test says: who may, until when, and what is left of one that ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc import StatusCode

from server.access.tokens import hash_token
from server.errors import Detail, Refused, Situation
from server.front.grpc.messages import find_message
from server.front.grpc.statuses import STATUS
from tests.patience import PATIENCE_S, POLL_S
from tests.server.front.answering import Asked
from tests.server.front.grpc.serving import GrpcHouse, answer_alike, make_infer, serve_grpc

StreamReply = find_message("inference.ModelStreamInferResponse")
LIMIT_S = 3.0  #: of a request, which should reach the worker within it; one test waits for it
Scenario = Callable[[GrpcHouse], Coroutine[Any, Any, None]]


def run_in_house(scenario: Scenario, folder: Path, answer: Callable[[Asked], Any] = answer_alike, **more: Any) -> None:
    """Run it before a front with these settings. Nothing is held when all is over."""

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), serve_grpc(folder, answer, **more) as house:
            await scenario(house)
            await wait_for(lambda: house.app.plane.held.size == 0)

    asyncio.run(run())


async def wait_for(predicate: Callable[[], bool]) -> None:
    """Return when it is true."""
    while not predicate():  # noqa: ASYNC110 -- what it waits for has no event
        await asyncio.sleep(POLL_S)


async def fail(call: Any) -> grpc.aio.AioRpcError:
    """The error that the call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def list_trailers(metadata: Any) -> dict[str, Any]:
    """Trailing metadata by name."""
    return {str(key): value for key, value in metadata}


def never(_: Asked) -> Any:
    """The worker does not answer."""
    return ...


def test_every_situation_of_a_worker_is_said(tmp_path: Path) -> None:
    """By its status, in our words, with advice when to try again, and counted."""
    said = [each for each in Situation if each is not Situation.OK]

    def answer(asked: Asked) -> Any:
        return Situation(int(asked.model)), msgspec.json.encode(Detail("it was so", field="inputs[0]", retry_ms=1500))

    async def scenario(house: GrpcHouse) -> None:
        for situation in said:
            error = await fail(house.call()(make_infer(str(int(situation)))))
            assert error.code() is STATUS[situation]
            assert error.details() == "inputs[0]: it was so"
            trailers = list_trailers(error.trailing_metadata())
            assert trailers["retry-after"] == "2"
            assert trailers["x-fleetcast-model-version"] == "v1"
        assert sum(house.counted().values()) == len(said)

    run_in_house(scenario, tmp_path, answer)


def test_an_answer_says_what_happened(tmp_path: Path) -> None:
    """Trailing metadata has the client's id, the cache, the version and the times, as headers have them over HTTP."""

    async def scenario(house: GrpcHouse) -> None:
        call = house.call()(make_infer(), metadata=(("x-request-id", "mine"),))
        await call
        trailers = list_trailers(await call.trailing_metadata())
        assert trailers["x-request-id"] == "mine"
        assert trailers["x-fleetcast-cache"] == "hit"
        assert trailers["x-fleetcast-model-version"] == "v1"
        assert "inference;dur=" in trailers["server-timing"]
        assert house.counted() == {"200": 1}

    run_in_house(scenario, tmp_path)


def test_a_cancelled_call_stops_its_work(tmp_path: Path) -> None:
    """The worker is told, and it counts as a client that has left."""

    async def scenario(house: GrpcHouse) -> None:
        call = house.call()(make_infer())
        await wait_for(lambda: len(house.worker.waiting) == 1)
        call.cancel()
        await wait_for(lambda: house.worker.cancelled == 1)
        await wait_for(lambda: house.counted() == {"499": 1})

    run_in_house(scenario, tmp_path, never)


@pytest.mark.parametrize(
    ("asked", "metadata", "timeout"),
    [
        (make_infer(timeout=int(LIMIT_S * 1e6)), (), None),
        (make_infer(), (("x-request-timeout-ms", f"{LIMIT_S * 1e3:.0f}"),), None),
        (make_infer(), (), LIMIT_S),
    ],
    ids=["parameter", "metadata", "the client's own"],
)
def test_a_deadline_is_the_requests(tmp_path: Path, asked: bytes, metadata: Any, timeout: float | None) -> None:
    """Whichever way it is said, the work is given up when it passes."""

    async def scenario(house: GrpcHouse) -> None:
        call = asyncio.ensure_future(fail(house.call()(asked, metadata=metadata, timeout=timeout)))
        await wait_for(lambda: len(house.worker.waiting) == 1)
        waiting = house.worker.waiting[0]
        assert waiting.deadline - asyncio.get_running_loop().time() <= LIMIT_S
        if timeout is None:  # a worker's client refuses what is late: this one is none
            waiting.reply.set_exception(Refused(Situation.DEADLINE, "the request was not answered in time"))
        assert (await call).code() is StatusCode.DEADLINE_EXCEEDED
        await wait_for(lambda: house.worker.cancelled == 1)
        await wait_for(lambda: sum(house.counted().values()) == 1)
        # A client whose own time-out has passed may be gone before the server's clock says the same.
        assert house.counted().keys() <= ({"504"} if timeout is None else {"504", "499"})

    run_in_house(scenario, tmp_path, never)


@pytest.mark.parametrize(
    ("method", "raw", "code", "said"),
    [
        ("ModelInfer", b"\xff\xff", StatusCode.INVALID_ARGUMENT, "is not a inference.ModelInferRequest"),
        ("ModelInfer", bytes(70_000), StatusCode.RESOURCE_EXHAUSTED, "70000 vs. 65536"),
        ("SystemSharedMemoryStatus", b"", StatusCode.UNIMPLEMENTED, ""),
    ],
)
def test_what_is_no_message_of_ours(tmp_path: Path, method: str, raw: bytes, code: StatusCode, said: str) -> None:
    """Bytes that are no message, too many of them, and methods that are not served; no worker hears of it."""

    async def scenario(house: GrpcHouse) -> None:
        error = await fail(house.call(method)(raw))
        assert error.code() is code
        assert said in (error.details() or "")
        assert not house.worker.asked

    run_in_house(scenario, tmp_path, max_body_bytes=65536)


def test_a_message_that_is_large_when_unpacked_is_refused(tmp_path: Path) -> None:
    """A small one that gzip makes large costs no more than the limit."""

    async def scenario(house: GrpcHouse) -> None:
        call = house.call()(make_infer("m" * 10_000_000), compression=grpc.Compression.Gzip)
        error = await fail(call)
        assert error.code() is StatusCode.RESOURCE_EXHAUSTED
        assert not house.worker.asked

    run_in_house(scenario, tmp_path, max_body_bytes=65536)


def test_a_client_that_sends_nothing_is_told_so(tmp_path: Path) -> None:
    """Its call ends after `client_timeout_s`, and others are answered while it waits, as long as there are places."""

    async def scenario(house: GrpcHouse) -> None:
        async def send_nothing() -> AsyncIterator[bytes]:
            await asyncio.get_running_loop().create_future()
            yield b""

        path = "/inference.GRPCInferenceService/ModelInfer"

        async def ask_beside() -> bool:
            """Whether another client is answered while the slow one waits: a stall makes both slow."""
            slow = asyncio.ensure_future(fail(house.channel.stream_unary(path, None, None)(send_nothing())))
            asked = asyncio.ensure_future(_ask(house))
            await asyncio.wait({asked})
            is_beside = asked.exception() is None and not slow.done()
            error = await slow
            assert error.code() is StatusCode.ABORTED
            assert "client_timeout_s" in (error.details() or "")
            return is_beside

        while not await ask_beside():
            pass

    run_in_house(scenario, tmp_path, client_timeout_s=0.3)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """What it does not take is let go. Its own side keeps some of the answers for it."""

    def answer(_: Asked) -> bytes:
        return msgspec.json.encode({"model_name": "m" * 8_000_000, "model_version": "1", "outputs": []})

    async def scenario(house: GrpcHouse) -> None:
        stream = house.stream()()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it may be cut off by now
            for _ in range(16):
                await stream.write(make_infer())
        await wait_for(lambda: house.counted().get("408") == 1)
        stream.cancel()

    run_in_house(scenario, tmp_path, answer, client_timeout_s=0.1)


def test_streams_are_bounded(tmp_path: Path) -> None:
    """As many as `max_inflight_bytes` has room for messages of `max_body_bytes`; one more is told why."""

    async def scenario(house: GrpcHouse) -> None:
        first = house.stream()()
        await first.write(make_infer(ident="1"))
        assert StreamReply.FromString(await first.read()).infer_response.model_name == "m"
        second = house.stream()()
        error = await fail(second.read())
        assert error.code() is StatusCode.UNAVAILABLE
        assert "max_inflight_bytes" in (error.details() or "")
        await first.done_writing()
        assert await first.read() is grpc.aio.EOF  # type: ignore[attr-defined]  # not in the stubs

    run_in_house(scenario, tmp_path, max_inflight_bytes=65536, max_body_bytes=32768)


def test_tokens_open_what_their_scopes_say(tmp_path: Path) -> None:
    """None, an unknown one, one of another scope, one of other models; probes are open to all."""
    path = tmp_path / "tokens.toml"
    rows = (("desk", "invoke", "au/"), ("ops", "manage", ""))
    path.write_text(
        "\n".join(
            f'[[tokens]]\nname = "{name}"\nsha256 = "{hash_token(name.encode())}"\nscopes = ["{scope}"]\n'
            f"models = {[models] if models else []}"
            for name, scope, models in rows
        )
    )
    path.chmod(0o600)

    async def scenario(house: GrpcHouse) -> None:
        for token, model, code in (
            (None, "au/1", StatusCode.UNAUTHENTICATED),
            ("no", "au/1", StatusCode.UNAUTHENTICATED),
            ("ops", "au/1", StatusCode.PERMISSION_DENIED),
            ("desk", "de/1", StatusCode.PERMISSION_DENIED),
        ):
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            assert (await fail(house.call()(make_infer(model), metadata=metadata))).code() is code
        assert not house.worker.asked
        await house.call()(make_infer("au/1"), metadata=(("authorization", "Bearer desk"),))
        assert house.worker.asked[0].client == "desk"
        await house.call("ServerLive")(b"")
        await house.call("Check", service="grpc.health.v1.Health")(b"")

    run_in_house(scenario, tmp_path, tokens=str(path))


def test_a_front_that_stops_answers_what_it_has(tmp_path: Path) -> None:
    """A running call is answered, an idle stream ends with UNAVAILABLE, a new call is refused."""

    async def scenario(house: GrpcHouse) -> None:
        stream = house.stream()()
        await stream.write(make_infer("quick"))
        await stream.read()
        call = asyncio.ensure_future(_ask(house))
        await wait_for(lambda: len(house.worker.waiting) == 1)
        house.listener.stop(PATIENCE_S)
        assert (await fail(stream.read())).code() is StatusCode.UNAVAILABLE
        assert (await fail(house.call()(make_infer(), timeout=PATIENCE_S))).code() is StatusCode.UNAVAILABLE
        house.worker.answer = answer_alike
        house.worker._reply(house.worker.waiting.pop(), house.worker.asked[-1])
        await call
        await house.listener.wait()

    def answer(asked: Asked) -> Any:
        return answer_alike(asked) if asked.model == "quick" else ...

    run_in_house(scenario, tmp_path, answer)


async def _ask(house: GrpcHouse) -> bytes:
    found: bytes = await house.call()(make_infer())
    return found


def test_what_does_not_end_is_told_that_the_server_stops(tmp_path: Path) -> None:
    """Before the time of the drain is over, in our words."""

    async def scenario(house: GrpcHouse) -> None:
        call = asyncio.ensure_future(fail(house.call()(make_infer())))
        await wait_for(lambda: len(house.worker.waiting) == 1)
        house.listener.stop(0.6)
        error = await call
        assert (error.code(), error.details()) == (StatusCode.UNAVAILABLE, "the server is stopping; try again")
        assert house.worker.cancelled == 1
        assert house.counted() == {"503": 1}
        await house.listener.wait()

    run_in_house(scenario, tmp_path, never)
