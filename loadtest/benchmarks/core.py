"""The core benchmark: throughput, cold start and memory, each as a ratio to a plain server or to a measured floor.

It takes a few minutes and needs wrk. Each command saves a record.
"""

import http.client
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from handlers.base import Family
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from loadtest import record
from loadtest.driver import wrk
from loadtest.fleets.network_shape import CONFIG as TCN
from loadtest.observe.local_server import run_local_server
from loadtest.observe.moto_server import S3_ENVIRONMENT, serve_moto
from loadtest.observe.processes import read_pss
from loadtest.peers.plain import serve_plain
from model_store.archives.manifest import Kind
from model_store.names import ModelName
from model_store.stores.object_store import open_source
from server.contract import HEADER_TARGET_MODEL, INVOCATIONS_PATH, JSON, NPY

SEED = 7
MODELS = 200
TCN_100_KB = {**TCN, "channels": 41}
BODY_DIGITS = 4

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command()
def warm(pairs: int = 7, seconds: float = 3.0) -> None:
    """Measure throughput at 8 and 32 connections and latency at 1, JSON and npy, alternating with the plain peer."""
    wrk.require_wrk()
    before = record.describe_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_fleet(folder / "store", build_family("tcn", TCN), TCN, [f"m{i}.mar" for i in range(MODELS)])
        json_body, npy_body = write_bodies(folder)
        server = stack.enter_context(run_local_server(str(folder / "store")))
        plain, _ = stack.enter_context(serve_plain(folder, build_family("tcn", TCN).reference(), MODELS))
        ours = wrk.WrkTarget("fleetcast", server.inference, MODELS, ".mar", json_body, JSON)
        npy = wrk.WrkTarget("fleetcast npy", ours.url, MODELS, ".mar", npy_body, NPY)
        peer = wrk.WrkTarget("plain", plain, MODELS, "", json_body, JSON)
        for target in (ours, npy, peer):
            wrk.run_wrk(target, 8, 2)  # every model loaded, every path warm
        runs: dict[tuple[str, int], list[wrk.WrkResult]] = {}
        rounds = [(pair, connections) for pair in range(pairs) for connections in (1, 8, 32)]
        for pair, connections in track(rounds, "warm", transient=True):
            for target in (ours, npy, peer)[:: 1 if pair % 2 else -1]:
                runs.setdefault((target.name, connections), []).append(wrk.run_wrk(target, connections, seconds))
    results = _warm_results(runs)
    _print_warm(results)
    CONSOLE.print(f"record: {record.save_record('warm', SEED, before, results)}")


@app.command()
def cold(models: int = 40) -> None:
    """Measure first answers of models that are only in an S3 store (100 KB archives), each beside one such GET."""
    before = record.describe_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint, requests = stack.enter_context(serve_moto(folder))
        names = [f"cold/m{i}.mar" for i in range(2 * models)]
        os.environ.update(S3_ENVIRONMENT)
        source = open_source("s3://bench/fleet", endpoint_url=endpoint)
        family = build_family("tcn", TCN_100_KB)
        sizes = [put_archive(source, name, family, seed) for seed, name in enumerate(names)]
        _, npy_body = write_bodies(folder)
        body = npy_body.read_bytes()
        server = stack.enter_context(
            run_local_server("s3://bench/fleet", ["--s3-endpoint-url", endpoint], S3_ENVIRONMENT)
        )
        connection = http.client.HTTPConnection(urlsplit(server.inference).netloc)
        invoke_model(connection, names[0], body)  # the first of the process, which imports and connects
        source.get(ModelName(names[1]))
        first, get, seen = [], [], len(requests())
        for i in track(range(2, 2 * models, 2), "cold", transient=True):
            get.append(time_call(source.get, ModelName(names[i + 1])))
            first.append(time_call(invoke_model, connection, names[i], body))
        asked = len(requests()) - seen - len(get)
    results = {
        "archive_bytes": max(sizes),
        "models": len(first),
        "store_requests_per_first_answer": asked / len(first),
        "get_ms": record.summarise_spread(get),
        "first_answer_ms": record.summarise_spread(first),
        "difference_ms": record.summarise_spread([a - b for a, b in zip(first, get, strict=True)]),
    }
    table = Table("", "median", "min", "max", title=f"{len(first)} first answers, archives of {max(sizes)} bytes")
    for key in ("get_ms", "first_answer_ms", "difference_ms"):
        found = results[key]
        assert isinstance(found, dict)
        table.add_row(key, *(f"{found[k]:.2f}" for k in ("median", "min", "max")))
    CONSOLE.print(table, f"store requests per first answer: {asked / len(first):.2f}")
    CONSOLE.print(f"record: {record.save_record('cold', SEED, before, results)}")


@app.command()
def memory(models: int = 2000, step: int = 500) -> None:
    """Measure the proportional set size of the worker as models become resident, per model of 70 KB of weights."""
    before = record.describe_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        family = build_family("tcn", TCN)
        write_fleet(folder / "store", family, TCN, [f"m{i}.mar" for i in range(models + step)])
        _, npy_body = write_bodies(folder)
        body = npy_body.read_bytes()
        server = stack.enter_context(
            run_local_server(str(folder / "store"), ["--workers", "1", "--model-cache-bytes", "2GiB"])
        )
        worker = next(p["pid"] for p in server.processes() if p["kind"] == "worker")
        connection = http.client.HTTPConnection(urlsplit(server.inference).netloc)
        sizes = []
        for i in track(range(models + step), "memory", transient=True):
            if i >= step and (i - step) % step == 0:
                sizes.append((i, read_pss(worker)))
            invoke_model(connection, f"m{i}.mar", body)
        sizes.append((models + step, read_pss(worker)))
        resident = server.loaded_models()
    (first, low), (last, high) = sizes[0], sizes[-1]
    per_model = (high - low) / (last - first)
    results = {
        "weights_bytes": family.row_floats * 4,
        "resident": resident,
        "pss_bytes_by_models": dict(sizes),
        "bytes_per_extra_model": per_model,
        "ratio_to_weights": per_model / (family.row_floats * 4),
    }
    table = Table("resident models", "worker PSS, MB")
    for count, size in sizes:
        table.add_row(str(count), f"{size / 1e6:.1f}")
    CONSOLE.print(table, f"{per_model / 1e6:.4f} MB per extra model of {family.row_floats * 4 / 1e6:.3f} MB of weights")
    CONSOLE.print(f"record: {record.save_record('memory', SEED, before, results)}")


@app.command(name="all")
def run_all() -> None:
    """Run the three benchmarks one after another."""
    warm()
    cold()
    memory()


# --- parts ----------------------------------------------------------------------------------------------------------


def write_fleet(folder: Path, family: Family, config: Mapping[str, Any], names: list[str]) -> None:
    """Write archives of one architecture with seeded random weights."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(track(names, "packing", transient=True)):
        (folder / name).write_bytes(_pack_model(family, config, name, seed))


def put_archive(source: Any, name: str, family: Family, seed: int) -> int:
    """Pack and store one archive of about 100 KB; returns its size."""
    data = _pack_model(family, TCN_100_KB, name, seed)
    source.put(ModelName(name), data)
    return len(data)


def _pack_model(family: Family, config: Mapping[str, Any], name: str, seed: int) -> bytes:
    tensors = random_tensors(family, SEED * 1_000_000 + seed)
    return pack_model(
        Kind.FORECASTER, ArchiveParts(tensors=tensors, architecture="tcn", config=config), model_name=name
    )


def write_bodies(folder: Path) -> tuple[Path, Path]:
    """Write the same 8 x 168 numbers as tensor JSON (11 KB) and as npy (5.5 KB)."""
    rng = random.Random(SEED)
    x = [[round(rng.gauss(0, 1), BODY_DIGITS) for _ in range(168)] for _ in range(8)]
    json_body, npy_body = folder / "body.json", folder / "body.npy"
    json_body.write_text(json.dumps({"x": x}))
    buffer = io.BytesIO()
    np.save(buffer, np.array(x, np.float32))
    npy_body.write_bytes(buffer.getvalue())
    return json_body, npy_body


def invoke_model(connection: http.client.HTTPConnection, name: str, body: bytes) -> bytes:
    """Invoke a model once. Raises RuntimeError unless the status is 200."""
    headers = {HEADER_TARGET_MODEL: name, "Content-Type": NPY}
    connection.request("POST", INVOCATIONS_PATH, body, headers)
    reply = connection.getresponse()
    data = reply.read()
    if reply.status != http.HTTPStatus.OK:
        raise RuntimeError(f"{name} answered {reply.status}: {data[:500]!r}")
    return data


def time_call(call: Callable[..., object], *args: object) -> float:
    """Return the milliseconds of a call."""
    started = time.perf_counter()
    call(*args)
    return (time.perf_counter() - started) * 1e3


def _warm_results(runs: dict[tuple[str, int], list[wrk.WrkResult]]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for (name, connections), found in runs.items():
        row = results.setdefault(f"{connections} connections", {})
        row[name] = {
            "requests_per_s": record.summarise_spread([run.requests_per_s for run in found]),
            "p50_ms": record.summarise_spread([run.p50_ms for run in found]),
            "p99_ms": record.summarise_spread([run.p99_ms for run in found]),
        }
        if name != "plain":
            pairs = list(zip(found, runs["plain", connections], strict=True))
            row[f"{name} / plain"] = {
                "requests_per_s": record.summarise_spread(
                    [ours.requests_per_s / peer.requests_per_s for ours, peer in pairs]
                ),
                "p50": record.summarise_spread([ours.p50_ms / peer.p50_ms for ours, peer in pairs]),
            }
    return results


def _print_warm(results: dict[str, Any]) -> None:
    table = Table("connections", "", "requests/s", "p50 ms", "p99 ms", "requests/s / plain", "p50 / plain")
    for connections, row in results.items():
        for name in ("plain", "fleetcast", "fleetcast npy"):
            rate, ratio = row[name]["requests_per_s"], row.get(f"{name} / plain")
            table.add_row(
                connections.split()[0],
                name,
                f"{rate['median']:.0f} ({rate['min']:.0f}-{rate['max']:.0f})",
                f"{row[name]['p50_ms']['median']:.3f}",
                f"{row[name]['p99_ms']['median']:.3f}",
                "" if ratio is None else "{median:.2f} ({min:.2f}-{max:.2f})".format(**ratio["requests_per_s"]),
                "" if ratio is None else "{median:.2f} ({min:.2f}-{max:.2f})".format(**ratio["p50"]),
            )
    CONSOLE.print(table)
