"""Fleets for load tests: their plan, and their writing into a store that may have objects."""

from collections import Counter
from pathlib import Path

import pytest
import urllib3
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.driver.dialects import find_fault
from loadtest.driver.request_bodies import read_request_bodies
from loadtest.fleets.archive_writer import StoreOccupied, WriteCounts
from loadtest.fleets.fleet import (
    SEEDS_APART,
    TOGETHER,
    Fleet,
    FleetMember,
    list_fleet_names,
    make_fleet,
    make_trained_fleet,
    parse_families,
    parse_sizes,
    write_fleet,
)
from loadtest.observe.local_server import run_local_server
from model_store.errors import StoreDenied
from model_store.names import parse_model_name
from model_store.stores.object_store import open_source
from server.shell.progress import follow_tasks
from tests.s3 import Fault, S3Server

ALL = {"tcn": 3.0, "tcn-8": 1.0, "mlp-8": 1.0, "gru": 1.0, "seq2seq": 1.0, "onnx": 1.0, "trained": 1.0}


def write(fleet: Fleet, where: str, *, over: bool = False) -> WriteCounts:
    """Without a look at the progress."""
    with follow_tasks() as tasks:
        return write_fleet(fleet, where, tasks, over=over)


def bytes_in(folder: Path) -> dict[str, bytes]:
    """Every file by its key."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the plan -------------------------------------------------------------------------------------------------------


def test_names_are_distinct_and_valid() -> None:
    """As many names as asked, also beyond the markets' own; a smaller fleet is the beginning of a larger one."""
    names = list_fleet_names(500)
    assert len(set(names)) == 500
    assert [parse_model_name(name) for name in names] == names
    assert names[:3] == list_fleet_names(3)
    assert names[204] == "us/spp-south/reserve.mar"
    assert names[205] == "au/nsw1/energy-2.mar"


def test_shares_are_met() -> None:
    """Of 5,000 models each kind has its share, to a few standard deviations; weights need not sum to one."""
    counts = Counter(member.kind for member in Fleet(5000, 1, {"tcn": 14, "mlp": 4, "onnx": 2}).members())
    assert counts["tcn"] == pytest.approx(3500, abs=130)
    assert counts["mlp"] == pytest.approx(1000, abs=115)
    assert counts["onnx"] == pytest.approx(500, abs=85)


def test_another_share_moves_its_own_models_only() -> None:
    """A kind that grows takes models from the others, who keep the rest; another seed draws anew; more are more."""
    shares = {"tcn": 6.0, "mlp": 3.0, "gru": 1.0}
    before, after = Fleet(1000, 0, shares).members(), Fleet(1000, 0, {**shares, "gru": 3.0}).members()
    moved = [(a.kind, b.kind) for a, b in zip(before, after, strict=True) if a.kind != b.kind]
    assert len(moved) > 50
    assert {kind for _, kind in moved} == {"gru"}
    assert Fleet(1500, 0, shares).members()[:1000] == before
    assert Fleet(1000, 1, shares).members() != before


def test_weights_of_seeds_are_apart() -> None:
    """The last model of a seed and the first of the next have other weights."""
    member = FleetMember(list_fleet_names(1)[0], 0, "tcn")
    assert Fleet(seed=3).seed_of(member) == 3 * SEEDS_APART


def test_families_are_read() -> None:
    """With shares or without."""
    assert parse_families("tcn:0.7, mlp-64:2") == {"tcn": 0.7, "mlp-64": 2.0}
    assert parse_families("gru") == {"gru": 1.0}


@pytest.mark.parametrize("text", ["", "tcn:", "tcn:0", "tcn:-1", "tcn:nan", "tcn:inf", "tcn:1,tcn:2", "tcn:1,", ":1"])
def test_families_that_make_no_sense(text: str) -> None:
    """The message names the part and how it is written."""
    with pytest.raises(ValueError, match="NAME:SHARE"):
        parse_families(text)


def test_sizes_are_read() -> None:
    """A median with a unit, and a spread."""
    assert parse_sizes("70KB:1.5") == (70_000, 1.5)


@pytest.mark.parametrize("text", ["", "70KB", "70KB:", "70KB:0", "0:1", "-1:1", "big:1", "70KB:inf", "70KB:nan"])
def test_sizes_that_make_no_sense(text: str) -> None:
    """The message shows an example."""
    with pytest.raises(ValueError, match="70KB:1"):
        parse_sizes(text)


# --- writing it -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    """Twice the same fleet is the same files, whatever their kinds; what is told of it is true."""
    fleet = Fleet(24, 4, ALL)
    assert set(ALL) == {member.kind for member in fleet.members()}
    found = [write(fleet, str(tmp_path / place)) for place in "ab"]
    files = bytes_in(tmp_path / "a")
    assert files == bytes_in(tmp_path / "b")
    assert list(files.keys() - list_fleet_names(24)) == []
    assert found[0] == found[1]
    assert sum(archives for archives, _ in found[0].kinds.values()) == 24
    assert sum(size for _, size in found[0].kinds.values()) == sum(map(len, files.values()))


@pytest.mark.slow
def test_a_cut_run_goes_on(tmp_path: Path) -> None:
    """Archives that are there with the right bytes are kept as they are; a torn one is not of this fleet."""
    where, fleet = str(tmp_path), Fleet(8)
    write(Fleet(5), where)
    inodes = {name: (tmp_path / name).stat().st_ino for name in list_fleet_names(5)}
    assert write(fleet, where).kept == 5
    assert {name: (tmp_path / name).stat().st_ino for name in list_fleet_names(5)} == inodes
    whole = bytes_in(tmp_path)
    torn = tmp_path / list_fleet_names(8)[6]
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreOccupied, match=r"au/nsw1/lower60sec\.mar in .* is another archive, .* --over"):
        write(fleet, where)
    assert write(fleet, where, over=True).kept == 7
    assert bytes_in(tmp_path) == whole


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    """Another file, and archives of another seed, stop the run before anything is written; `over` leaves strangers."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreOccupied, match=r"has thesis\.txt, which is not of this fleet"):
        write(Fleet(3), str(tmp_path))
    assert list(bytes_in(tmp_path)) == ["thesis.txt"]
    write(Fleet(3, seed=1), str(tmp_path), over=True)
    (tmp_path / "thesis.txt").unlink()
    before = bytes_in(tmp_path)
    with pytest.raises(StoreOccupied, match="of another seed"):
        write(Fleet(3, seed=2), str(tmp_path))
    assert bytes_in(tmp_path) == before


def test_a_wrong_family_writes_nothing(tmp_path: Path) -> None:
    """All kinds are checked first, however rare."""
    with pytest.raises(ValueError, match="no family 'lstm'"):
        write(Fleet(3, 0, {"tcn": 1, "lstm": 1e-9}), str(tmp_path / "models"))
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_a_trained_fleet_is_one_of_the_fleets(tmp_path: Path) -> None:
    """The demo's fleet is the one of the kind `trained`, as long as it is fitted in one go."""
    assert TOGETHER >= 200
    make_trained_fleet(str(tmp_path / "demo"), 2, seed=3)
    assert make_fleet(str(tmp_path / "fleet"), 2, seed=3, families="trained") == list_fleet_names(2)
    assert bytes_in(tmp_path / "demo") == bytes_in(tmp_path / "fleet")


@pytest.mark.e2e
def test_every_kind_is_served_from_s3(bucket: str) -> None:
    """A mixed fleet written to S3 is listed and answered by a real server, model by model, with finite numbers."""
    where, fleet = f"s3://{bucket}/fleet", Fleet(16, 4, ALL)
    members = {member.name: member for member in fleet.members()}
    assert {member.kind for member in members.values()} == set(ALL)
    write(fleet, where)
    source = open_source(where)
    assert {listed.name for listed in source.list()} == members.keys()
    asked = read_request_bodies(source, list(members), None, 0, lambda: None)
    assert not asked.left_out
    with run_local_server(where, ["--workers", "1"]) as server:
        for name, question in asked.questions.items():
            headers = {"X-Amzn-SageMaker-Target-Model": name, "Content-Type": question.content_type}
            url = f"{server.inference}/invocations"
            reply = urllib3.request("POST", url, body=question.body, headers=headers, retries=False)
            assert (reply.status, find_fault(reply.data)) == (200, None), members[name].kind


def test_a_failing_store_is_said_and_the_run_goes_on(bucket: str, s3: S3Server) -> None:
    """A refused put ends the run with the store's error; the next run puts what is missing and nothing else."""
    where, fleet = f"s3://{bucket}/fleet", Fleet(30)
    refused = list_fleet_names(30)[20]
    s3.inject(Fault(match=f"{bucket}/fleet/{refused}", status=403))
    with pytest.raises(StoreDenied, match=refused):
        write(fleet, where)
    missing = 30 - len(list(open_source(where).list()))
    assert 1 <= missing < 30
    puts = len(s3.seen("PUT", f"{bucket}/fleet/"))
    assert write(fleet, where).kept == 30 - missing
    assert len(s3.seen("PUT", f"{bucket}/fleet/")) - puts == missing


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_tells_what_it_made(tmp_path: Path) -> None:
    """A table by kind, and the range of names; again, that all was there; otherwise why not, and 1."""
    flags = [str(tmp_path / "models"), "--models", "5"]
    mixed = [*flags, "--families", "tcn-8:1,onnx:1"]
    first, again = (CliRunner().invoke(app, ["fleet", *mixed]) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output
    assert "tcn-8" in first.output
    assert "5 archives in" in first.output
    assert "from au/nsw1/energy.mar to au/nsw1/raisereg.mar\n" in first.output
    assert "raisereg.mar, 5 of them there before\n" in again.output
    refused = CliRunner().invoke(app, ["fleet", *flags, "--sizes", "70KB:1"])
    assert refused.exit_code == 1
    assert "no fleet: au/nsw1/" in refused.output
    assert CliRunner().invoke(app, ["fleet", *flags, "--sizes", "70KB:1", "--over"]).exit_code == 0
    both = CliRunner().invoke(app, ["fleet", *mixed, "--sizes", "70KB:1"])
    assert (both.exit_code, both.output) == (1, "no fleet: give either --families or --sizes\n")
    folder = CliRunner().invoke(app, ["fleet", *flags, "--create-bucket"])
    assert "--create-bucket is for s3:// URLs" in folder.output


def test_the_command_makes_a_bucket(s3: S3Server, bucket: str) -> None:
    """It is made, and that it is there already is no error."""
    where = f"s3://{bucket}-made/demo"
    for _ in range(2):
        made = CliRunner().invoke(app, ["fleet", where, "--models", "2", "--create-bucket"])
        assert made.exit_code == 0, made.output
    assert len(list(open_source(where).list())) == 2
