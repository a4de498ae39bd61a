"""A node that is killed, full, drained, idle or crowded: what owners are told, and what goes on all the same."""

from __future__ import annotations

import contextlib
import copy
import errno
import secrets
import shutil
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import grpc
import psutil
import pytest
import sqlalchemy as sa
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import nn

from client_side.cutting import Cut
from client_side.frames import encode_frame
from client_side.link import Link, NodeAddress, SessionRequest
from client_side.spawn import LocalNode
from client_side.trainer import Trainer
from client_side.unsplit import UnsplitTrainer
from privacy.policy import CLEAR
from protos import node_pb2
from server_side.accounts import Limits
from server_side.keeper import Keeper
from server_side.kept import KeptSnapshots
from server_side.metrics import Metrics
from server_side.node import NodeConfig, start_node
from server_side.opening import Opening
from server_side.table import SessionRow, SessionState, SessionTable
from tests import hostile_node
from tests.disks import small_disk
from tests.released import released
from tests.wire_client import Good, Job, WireClient, frame, new_owner, plan_of_job, reason_of
from wire.errors import SessionLostError, UnreachableError, WireError, error_from_rpc
from wire.identity import Identity, create_identity, load_identity
from wire.program import decode_program
from wire.recipe import SGD, AdamW, Loss
from wire.state import STATE_PREFIX, load_state
from wire.trust import Trust

MIB: Final = 2**20
FORWARD, BACKWARD = node_pb2.PHASE_FORWARD, node_pb2.PHASE_BACKWARD
X, G = torch.ones(4, 6), torch.ones(4, 4)


tiny = hostile_node.tiny


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An owner's and a node's identity, which take seconds to make."""
    folder = tmp_path_factory.mktemp("identities")
    for role in ("owner", "node"):
        create_identity(folder / role, role=role, passphrase="of nobody")
    return folder


@pytest.fixture
def home(tmp_path: Path, identities: Path) -> Path:
    """A folder for one node."""
    for role in ("owner", "node"):
        shutil.copytree(identities / role, tmp_path / role)
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, identities: Path) -> Iterator[LocalNode]:
    """A node that no test harms."""
    folder = tmp_path_factory.mktemp("shared")
    for role in ("owner", "node"):
        shutil.copytree(identities / role, folder / role)
    with LocalNode(folder, threads=1, options=["--metrics", "localhost:0"]) as node:
        yield node


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


def request_of(job: Job) -> SessionRequest:
    return SessionRequest(
        program=job.program,
        program_digest=job.digest,
        tensors={STATE_PREFIX + name: released(tensor) for name, tensor in job.state.items()},
        topology=node_pb2.TOPOLOGY_U_SHAPE,
        loss=None,
        optimizer=job.optimizer,
        seed=1,
        max_rows=8,
        max_in_flight=2,
        want_input_gradients=True,
    )


def rows(folder: Path) -> dict[str, int]:
    """How many sessions the node's table has in each state."""
    engine = sa.create_engine(f"sqlite:///{folder / 'state' / 'node.db'}")
    try:
        with engine.connect() as connection:
            found = connection.execute(sa.text("SELECT state, count(*) FROM node_sessions GROUP BY state")).all()
    finally:
        engine.dispose()
    return {str(state): int(count) for state, count in found}


# --- T07: killed


def test_T07_a_node_killed_in_the_middle_of_a_step_is_told_and_comes_back_clean(home: Path, tiny: Job) -> None:
    node = LocalNode(home, threads=1)
    patient = Link(NodeAddress.parse(node.address), node.owner, reconnect_s=60)
    hasty = Link(NodeAddress.parse(node.address), node.owner, reconnect_s=0.5)
    opening = threading.Thread(target=_open_without_end, args=(node, tiny))
    try:
        for link in (patient, hasty):
            link.open(request_of(tiny))
            link.send(encode_frame(step=0, micro_batch=0, phase=FORWARD, tensors=[released(X)]))
            link.receive()
        opening.start()
        wait_until(lambda: rows(home).get("open", 0) > 4)

        node.kill()
        opening.join()

        hasty.send(encode_frame(step=0, micro_batch=0, phase=BACKWARD, tensors=[released(G)], update=True))
        with pytest.raises(UnreachableError, match=r"the node localhost:\d+ did not come back within 0.5 s"):
            hasty.receive()
        left = rows(home)
        assert set(left) == {"open"}
        patient.send(encode_frame(step=0, micro_batch=0, phase=BACKWARD, tensors=[released(G)], update=True))

        with LocalNode(home, threads=1, listen=f"localhost:{node.port}") as again:
            with pytest.raises(
                SessionLostError, match="the node restarted and the session's state is gone; open a new"
            ):
                patient.receive()

            assert rows(home) == {"lost": left["open"]}
            with WireClient(again.address, again.owner) as client:
                good = Good(client, tiny)
                good.step(2)
                good.check()
    finally:
        patient.close(end_session=False)
        hasty.close(end_session=False)
        node.kill()


def _open_without_end(node: LocalNode, job: Job) -> None:
    """Opens sessions until the node dies."""
    with WireClient(node.address, node.owner) as client, contextlib.suppress(grpc.RpcError):
        while True:
            client.open(job)


# --- T07: a full disk


def test_T07_a_full_disk_refuses_openings_and_leaves_live_sessions_alone(home: Path, tiny: Job) -> None:
    with small_disk(home / "state"), LocalNode(home, threads=1) as node, WireClient(node.address, node.owner) as client:
        good = Good(client, tiny)
        leaving = client.open(tiny)
        good.begin()
        ballast = home / "state" / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left") as full:  # noqa: PT012
            while True:
                file.write(bytes(4096))
        assert full.value.errno == errno.ENOSPC

        # The log in front of the table may have room for a few more rows.
        reasons = [_outcome(client, tiny) for _ in range(60)]
        told = [reason for reason in reasons if reason != "opened"]
        assert set(told) == {"STORAGE_FAILED"}
        assert told == reasons[-len(told) :]
        good.finish()
        good.step(2)
        good.check()
        assert client.close(leaving)
        held = client.describe().open_sessions

        ballast.unlink()
        assert client.close(client.open(tiny))
        assert client.describe().open_sessions == held == 61 - len(told)


def _outcome(client: WireClient, job: Job) -> str:
    try:
        client.open(job)
    except grpc.RpcError as error:
        told = error_from_rpc(error)
        assert isinstance(told, WireError)
        return told.reason
    return "opened"


def test_T07_a_table_that_may_not_grow_refuses_openings_until_it_may(shared: LocalNode, tiny: Job) -> None:
    """As a full disk or a quota, for those who may not mount one."""
    with WireClient(shared.address, shared.owner) as client:
        good = Good(client, tiny)
        process = psutil.Process(shared.process.pid)
        before = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (4096, before[1]))

        assert reason_of(lambda: client.open(tiny)) == "STORAGE_FAILED"
        good.step(2)
        good.check()

        process.rlimit(psutil.RLIMIT_FSIZE, before)
        assert client.close(client.open(tiny))
        assert client.close(good.session)
        assert client.describe().open_sessions == 0


# --- the end of a node


def health_of(client: WireClient, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(client.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)


def test_sigterm_drains_new_sessions_are_refused_and_live_ones_finish(home: Path, tiny: Job) -> None:
    options = ["--drain-seconds", "60", "--metrics", "localhost:0"]
    with LocalNode(home, threads=1, options=options) as node, WireClient(node.address, node.owner) as client:
        good = Good(client, tiny)
        good.begin()
        assert health_of(client) == health_pb2.HealthCheckResponse.SERVING
        node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.describe().draining)

        assert reason_of(lambda: client.open(tiny)) == "DRAINING"
        assert health_of(client) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(node, "/healthz")
        good.finish()
        good.step(3)
        good.check()
        assert node.process.poll() is None
        assert client.close(good.session)
        assert node.process.wait(20) == 0

    assert rows(home) == {"closed": 1}


def test_a_second_sigterm_stops_at_once(home: Path, tiny: Job) -> None:
    with (
        LocalNode(home, threads=1, options=["--drain-seconds", "600"]) as node,
        WireClient(node.address, node.owner) as client,
    ):
        session = client.open(tiny)
        node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.describe().draining)
        with client.train(session) as pipe:
            pipe.ask(node_pb2.TrainRequest(frame=frame(0, 0, FORWARD, X)))

            node.process.send_signal(signal.SIGTERM)

            assert node.process.wait(20) == 0
            with pytest.raises(grpc.RpcError):
                pipe.receive()

    assert rows(home) == {"lost": 1}


@contextlib.contextmanager
def node_here(home: Path, database: str | None = None, idle_s: float = 60.0) -> Iterator[WireClient]:
    """A node in this process, which starts sooner; the sockets are real."""
    own, owner = load_identity(home / "node"), load_identity(home / "owner")
    (home / "trusted").mkdir(exist_ok=True)
    (home / "trusted" / "owner.crt").write_bytes(owner.certificate_pem)
    config = NodeConfig(
        listen="localhost:0",
        identity=own,
        trust=Trust(home / "trusted"),
        state_dir=home / "state",
        database=database,
        device="cpu",
        idle_s=idle_s,
    )
    node = start_node(config)
    try:
        with WireClient(f"localhost:{node.port}#sha256:{own.fingerprint}", owner) as client:
            yield client
    finally:
        node.stop(0)


def test_an_idle_session_expires_and_one_at_work_does_not(home: Path, tiny: Job) -> None:
    with node_here(home, idle_s=1.0) as client:
        good, idle = Good(client, tiny), client.open(tiny)
        with client.infer(idle) as stream:
            for _ in range(10):
                good.step()
                time.sleep(0.2)
            with pytest.raises(grpc.RpcError):
                stream.receive()

        with pytest.raises(grpc.RpcError, match="the session was idle for 1 s and expired; open a new session"):
            client.answer(idle, frame(0, 0, FORWARD, X))
        assert reason_of(lambda: client.snapshot(idle)) == "SESSION_LOST"
        good.step()
        good.check()
        assert client.describe().open_sessions == 1
        assert rows(home) == {"expired": 1, "open": 1}


# --- what a node tells its operator


def get(node: LocalNode, path: str) -> str:
    with urllib.request.urlopen(f"http://{node.ready['metrics']}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def counts(node: LocalNode) -> dict[str, float]:
    """The node's metrics by name and labels."""
    lines = (line.rpartition(" ") for line in get(node, "/metrics").splitlines() if not line.startswith("#"))
    return {name.removeprefix("cloister_node_"): float(number) for name, _, number in lines}


def test_health_and_metrics_tell_how_the_node_is(shared: LocalNode, tiny: Job) -> None:
    with WireClient(shared.address, shared.owner) as client:
        before = counts(shared)
        good = Good(client, tiny)
        good.step(2)
        assert reason_of(lambda: client.open(tiny, max_rows=0)) == "SPEC_REJECTED"
        for service in ("", "cloister.v1.Node"):
            assert health_of(client, service) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            health_of(client, "nothing")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        assert get(shared, "/healthz").strip()
        # A step counts once it is applied, which is after its answer has left.
        wait_until(lambda: counts(shared)["steps_total"] == before.get("steps_total", 0) + 2)
        after = counts(shared)
        assert client.close(good.session)

    up = 2 * 2 * (4 * 6 + 4 * 4) * 4  # steps, micro-batches, smashed data and output gradients in float32
    moved = {name: number - before.get(name, 0) for name, number in after.items()}
    assert moved["sessions_open"] == 1
    assert moved["steps_total"] == 2
    assert moved['frames_total{phase="forward"}'] == moved['frames_total{phase="backward"}'] == 4
    assert moved['compute_seconds_count{phase="forward"}'] == 4
    assert moved["received_bytes_total"] == moved["sent_bytes_total"] == up
    assert moved['refusals_total{reason="SPEC_REJECTED"}'] == 1
    assert shared.owner.fingerprint not in get(shared, "/metrics")


def test_postgresql_holds_the_nodes_table(home: Path, tiny: Job, postgres_url: str) -> None:
    with node_here(home, postgres_url) as client:
        good = Good(client, tiny)
        good.step()
        parts = tiny.parts()
        client.send_opening(parts)
        client.close(parts[0].spec.session_id)
        assert reason_of(lambda: client.send_opening(parts)) == "SESSION_REUSED"
        # Ends nothing itself, as one that was killed; it ends as lost below, and once more when the first one stops.
        with node_here(home, postgres_url) as again:
            assert reason_of(lambda: again.snapshot(good.session)) == "SESSION_LOST"
            assert reason_of(lambda: again.send_opening(parts)) == "SESSION_REUSED"
            better = Good(again, tiny)
            better.step()
            better.check()

    assert not (home / "state" / "node.db").exists()


# --- a crowd


def memory(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def test_fifty_idle_sessions_take_little_more_than_their_states(
    shared: LocalNode,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = Job.of(nn.Sequential(nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 1000)), torch.randn(4, 1000))
    weights = sum(t.nbytes for t in job.state.values())
    assert weights > 4_000_000  # 1 M parameters
    process = psutil.Process(shared.process.pid)
    forward, backward = (
        frame(0, 0, FORWARD, torch.ones(8, 1000)),
        frame(0, 0, BACKWARD, torch.ones(8, 1000), update=True),
    )
    with WireClient(shared.address, shared.owner) as client:
        warm = client.open(job)
        client.answer(warm, forward, backward)
        client.close(warm)
        base, threads = memory(process), process.num_threads()

        sessions = [client.open(job) for _ in range(50)]
        opened = memory(process) - base
        for session in sessions:
            client.answer(session, forward, backward)
        trained = memory(process) - base
        for session in sessions:
            client.close(session)
        wait_until(lambda: memory(process) - base < 50 * weights / 2)
        closed = memory(process) - base

    with capsys.disabled():
        print(  # noqa: T201 -- the figure is the point
            f"\n50 sessions of {weights / MIB:.2f} MiB: opened {opened / MIB:.0f} MiB ({opened / weights / 50:.2f} x "
            f"their states), after a step with momentum {trained / MIB:.0f} MiB ({trained / weights / 100:.2f} x), "
            f"closed {closed / MIB:.0f} MiB; {process.num_threads() - threads} more threads",
        )
    assert opened < 1.6 * 50 * weights + 32 * MIB
    assert trained < 1.6 * 2 * 50 * weights + 32 * MIB
    assert process.num_threads() <= threads + 8


def parts_of_a_model() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Dropout in the middle: eight sessions draw from one generator of the node's, each its own numbers."""
    torch.manual_seed(1)
    middle = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU()), middle, nn.Linear(16, 3)


def test_eight_owners_who_train_at_once_all_get_right_numbers(shared: LocalNode) -> None:
    owners = [new_owner(f"owner {number}") for number in range(8)]
    for number, owner in enumerate(owners):
        (shared.folder / "trusted" / f"owner{number}.crt").write_bytes(owner.certificate_pem)
    front, middle, head = parts_of_a_model()
    cut = Cut(front=front, middle=middle, head=head, example=torch.randn(4, 8))
    jobs = [(copy.deepcopy(cut), copy.deepcopy(cut), number) for number in range(8)]
    failed: list[BaseException] = []
    together = threading.Barrier(8)

    def work(split: Cut, owner: Identity, number: int) -> None:
        try:
            together.wait(30)
            with Trainer(
                split,
                policy=CLEAR,
                node=shared.address,
                identity=owner,
                seed=number,
                micro_batches=1 + number % 3,
                **_recipe(number),  # type: ignore[arg-type]  # an optimizer
            ) as trainer:
                trainer.fit(_batches(number), epochs=2)
        except BaseException as error:  # noqa: BLE001 -- told below, by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(s, o, n)) for (s, _, n), o in zip(jobs, owners, strict=True)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed, failed

    for split, whole, number in jobs:
        optimizer = _recipe(number)["optimizer"]
        unsplit = UnsplitTrainer(
            whole,
            optimizer=optimizer,  # type: ignore[arg-type]  # as above
            loss=Loss("cross_entropy"),
            micro_batches=1 + number % 3,
            seed=number,
        )
        unsplit.fit(_batches(number), epochs=2)
        trained, wanted = split.reassemble().state_dict(), whole.reassemble().state_dict()
        for name, value in wanted.items():
            assert torch.equal(trained[name], value), (number, name)
    one, other = (split.reassemble().state_dict()["middle.0.weight"] for split, _, _ in jobs[:2])
    assert not torch.equal(one, other)


def _recipe(number: int) -> dict[str, object]:
    return {"optimizer": SGD(lr=0.05, momentum=0.9) if number % 2 else AdamW(lr=0.01)}


def _batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(number)
    return [(torch.randn(12, 8, generator=generator), torch.randint(3, (12,), generator=generator)) for _ in range(6)]


# --- the keeper, in this process


@contextlib.contextmanager
def keeper_on(table: SessionTable, *, idle_s: float = 60.0) -> Iterator[Keeper]:
    folder = Path(tempfile.mkdtemp())
    keeper = Keeper(
        fingerprint="0" * 64,
        table=table,
        kept=KeptSnapshots(folder / "snapshots"),
        limits=Limits(),
        metrics=Metrics(),
        device=torch.device("cpu"),
        idle_s=idle_s,
    )
    try:
        yield keeper
    finally:
        keeper.stop()
        table.close()
        shutil.rmtree(folder)


def opening_of(job: Job, keeper: Keeper, owner: str) -> Opening:
    reservation = keeper.accounts.reserve(owner, 1, 1)
    return Opening(plan_of_job(job), decode_program(job.program), load_state(job.state_bytes()), reservation)


def test_T04_an_opening_that_is_being_written_down_is_waited_for_by_its_twin(
    tmp_path: Path,
    tiny: Job,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, owner, written = SessionTable(f"sqlite:///{tmp_path / 'node.db'}"), "f" * 64, threading.Event()
    real = table.open

    def slowly(row: SessionRow) -> None:
        real(row)
        written.set()
        time.sleep(0.3)

    monkeypatch.setattr(table, "open", slowly)
    with keeper_on(table) as keeper:
        spec, opened = tiny.spec(tiny.state_bytes(), session_id=b"s" * 16), []
        first = threading.Thread(
            target=lambda: opened.append(keeper.open(owner, spec, opening_of(tiny, keeper, owner)))
        )
        first.start()
        assert written.wait(10)

        twin = keeper.existing(owner, spec)
        again = keeper.open(owner, spec, opening_of(tiny, keeper, owner))

        first.join()
        assert opened == [twin] == [again]
        assert keeper.accounts.sessions == 1


def test_the_janitor_outlives_a_row_that_somebody_else_ended(tmp_path: Path, tiny: Job) -> None:
    """As where a second process started under the same identity, on the same database."""
    table, owner = SessionTable(f"sqlite:///{tmp_path / 'node.db'}"), "f" * 64
    with keeper_on(table, idle_s=0.4) as keeper:
        for _ in range(2):
            spec = tiny.spec(tiny.state_bytes(), session_id=secrets.token_bytes(16))
            keeper.open(owner, spec, opening_of(tiny, keeper, owner))
            table.end(spec.session_id, SessionState.LOST)
            wait_until(lambda: len(keeper) == 0)
        assert keeper.accounts.sessions == 0
