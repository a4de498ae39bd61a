"""Receipts: node and owner count the same; whatever a node signs or returns otherwise stops the run (T17, T22)."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from eth_account import Account
from eth_account.signers.local import LocalAccount
from hypothesis import given, settings
from hypothesis import strategies as st

import cloister
from client_side.frames import SentFrame
from client_side.receipts import Receipts, SessionTally, SignedSegment
from client_side.spawn import passphrase_file
from cloister import digits
from cloister.commands.card import _cell
from cloister.main import app
from protos import node_pb2, tensor_pb2
from provenance.receipts import Segment, check_chain, check_receipts, open_receipt, sign_receipt
from provenance.records import NodeRecord, RunRecord, Subject, open_record, sign_record
from provenance.tallies import HASHES, Tally, answer_digest, boundary_salt, frame_digest, state_digest, state_root
from wire.codec import encode
from wire.errors import ProvenanceError, ReceiptError
from wire.state import tensor_digest

NODE: LocalAccount = Account.from_key("0x" + "77" * 32)
PIN = "ab" * 32
SALT = bytes(range(32))
SPEC = bytes(32)


def exchange(step: int) -> tuple[node_pb2.Frame, node_pb2.TrainResponse]:
    up, down = encode(torch.full((2, 3), float(step))), encode(torch.full((2,), step + 0.5))
    frame = node_pb2.Frame(step=step, phase=node_pb2.PHASE_LOSS, update=True, tensors=[up], labels=down, loss_weight=1)
    return frame, node_pb2.TrainResponse(step=step, phase=node_pb2.PHASE_LOSS, updated=True, tensors=[down], loss=0.25)


def record(fingerprint: str = PIN) -> bytes:
    node = NodeRecord(address=NODE.address, device="cpu", class_digest="c1" * 32, software={"torch": "2.13.0"})
    return sign_record(Subject(name="TLS certificate", digest={"sha256": fingerprint}), node, NODE)


def owner(kind: str = "sha256", **changes: object) -> SessionTally:
    given_: dict[str, object] = {
        "kind": kind,
        "salt": SALT,
        "spec": SPEC,
        "first_step": 0,
        "node_record": record(),
        "fingerprint": PIN,
    }
    return SessionTally(**(given_ | changes))  # type: ignore[arg-type]  # as the test says


def played(tally: SessionTally, steps: int) -> None:
    for step in range(steps):
        frame, answer = exchange(step)
        data = node_pb2.TrainRequest(frame=frame).SerializeToString()
        tally.sent(SentFrame(step, 0, frame.phase, update=True, data=data))
        tally.received(answer)


def signed(steps: int, *, kind: str = "sha256", key: LocalAccount = NODE, **changes: object) -> node_pb2.Receipt:
    tally = Tally(kind, SALT, 0)
    for step in range(steps):
        frame, answer = exchange(step)
        tally.exchanged(frame_digest(frame, kind), answer_digest(answer, kind), updated=True)
    roots = bytes([1] * 32), bytes([2] * 32)
    said: dict[str, object] = {
        "spec": SPEC.hex(),
        "number": 0,
        "first_step": 0,
        "last_step": steps - 1,
        "leaves": tally.leaves().hex(),
        "state_before": "00" * 32,
        "state_after": state_digest(boundary_salt(SALT, "state", steps), *roots).hex(),
        "hash": kind,
    }
    segment = Segment(**(said | changes))  # type: ignore[arg-type]  # as the test says
    return node_pb2.Receipt(envelope=sign_receipt(segment, key), model_root=roots[0], optimizer_root=roots[1])


@pytest.mark.parametrize("kind", HASHES)
def test_a_receipt_over_what_both_sides_saw_is_taken(kind: str) -> None:
    tally = owner(kind)
    played(tally, 3)

    taken = tally.accept(signed(3, kind=kind))

    assert (taken.receipt.segment.last_step, taken.receipt.node, tally.due) == (2, NODE.address, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"leaves": "11" * 32}, "over other bytes than were exchanged"),
        ({"last_step": 3}, "over other steps"),
        ({"first_step": 1}, "over other steps"),
        ({"number": 1}, "of another session"),
        ({"spec": "22" * 32}, "of another session"),
        ({"state_after": "33" * 32}, "of another state"),
        ({"hash": "blake3"}, "by another hash"),
        ({"key": Account.from_key("0x" + "78" * 32)}, "by another key"),
    ],
)
def test_T22_a_receipt_that_says_anything_else_stops_the_run(changes: dict[str, object], words: str) -> None:
    tally = owner()
    played(tally, 3)

    with pytest.raises(ReceiptError, match=words):
        tally.accept(signed(3, **changes))  # type: ignore[arg-type]  # one of the two kinds of changes


def test_T22_a_receipt_with_one_byte_flipped_stops_the_run() -> None:
    tally, whole = owner(), signed(2)
    played(tally, 2)
    envelope = bytearray(whole.envelope)
    envelope[len(envelope) // 2] ^= 1

    with pytest.raises(ReceiptError, match="receipt is none"):
        tally.accept(node_pb2.Receipt(envelope=bytes(envelope), model_root=whole.model_root))


def test_a_node_whose_record_is_anothers_gets_no_session() -> None:
    with pytest.raises(ReceiptError, match="another node than the one that is pinned"):
        owner(node_record=record("cd" * 32))
    with pytest.raises(ReceiptError, match="not its own record"):
        owner(node_record=b"{}")


def test_a_refused_frame_is_in_no_receipt() -> None:
    tally = owner()
    refused = node_pb2.TrainRequest(frame=node_pb2.Frame(step=0, phase=node_pb2.PHASE_LOSS)).SerializeToString()
    tally.sent(SentFrame(0, 0, node_pb2.PHASE_LOSS, update=True, data=refused))
    tally.refused()
    played(tally, 1)

    assert tally.accept(signed(1)).receipt.segment.last_step == 0


FIELDS = ("step", "micro_batch", "loss_weight")


@settings(deadline=None)  # a busy machine says nothing of the law
@given(st.sampled_from(FIELDS), st.integers(1, 100))
def test_every_field_of_a_frame_changes_its_digest(name: str, more: int) -> None:
    frame, _ = exchange(1)
    other = node_pb2.Frame.FromString(frame.SerializeToString())
    setattr(other, name, getattr(other, name) + more)

    assert frame_digest(other, "sha256") != frame_digest(frame, "sha256")


def test_labels_tensors_and_rows_cannot_take_each_others_place() -> None:
    tensor = encode(torch.ones(2))
    frames = [
        node_pb2.Frame(tensors=[tensor, tensor]),
        node_pb2.Frame(tensors=[tensor], labels=tensor),
        node_pb2.Frame(tensors=[tensor]),
        node_pb2.Frame(tensors=[tensor, tensor_pb2.Tensor()]),
        node_pb2.Frame(rows=[1, 2]),
        node_pb2.Frame(rows=[2, 1]),
        node_pb2.Frame(tensors=[encode(torch.ones(2, 1))]),
        node_pb2.Frame(tensors=[tensor], update=True),
    ]

    assert len({frame_digest(frame, "sha256") for frame in frames}) == len(frames)


def test_T21_without_the_salt_the_same_training_has_other_leaves_and_states() -> None:
    leaves = []
    for salt in (SALT, bytes(32)):
        tally = Tally("sha256", salt, 0)
        tally.exchanged(bytes(32), bytes(32), updated=True)
        leaves.append((tally.leaves(), state_digest(boundary_salt(salt, "state", 1), bytes(32), bytes(32))))

    assert leaves[0][0] != leaves[1][0]
    assert leaves[0][1] != leaves[1][1]


def test_a_receipt_needs_a_whole_step() -> None:
    tally = Tally("sha256", SALT, 5)
    with pytest.raises(ProvenanceError, match="one at least"):
        tally.leaves()
    tally.exchanged(bytes(32), bytes(32), updated=True)
    tally.exchanged(bytes(32), bytes(32), updated=False)

    with pytest.raises(ProvenanceError, match="the end of a step"):
        tally.leaves()


def segment(first: int, last: int, before: str, after: str) -> SignedSegment:
    said = Segment(
        spec="00" * 32,
        number=0,
        first_step=first,
        last_step=last,
        leaves="44" * 32,
        state_before=before * 32,
        state_after=after * 32,
        hash="sha256",
    )
    return SignedSegment(open_receipt(sign_receipt(said, NODE)), record(), state_root({"w": bytes(32)}), bytes(32))


def test_steps_that_were_computed_again_count_once_and_the_file_remembers(tmp_path: Path) -> None:
    book = Receipts(tmp_path / "receipts.jsonl")
    for each in (segment(0, 9, "00", "01"), segment(10, 19, "01", "02"), segment(10, 14, "01", "03")):
        book.take(each)

    again = Receipts(tmp_path / "receipts.jsonl")
    assert [each.receipt.segment.last_step for each in again.kept] == [9, 14]
    assert again.salt == book.salt
    assert (tmp_path / "receipts.jsonl").stat().st_mode & 0o077 == 0


def test_T17_a_node_that_goes_on_from_another_state_is_found() -> None:
    book = Receipts()
    book.take(segment(0, 9, "00", "01"))

    with pytest.raises(ReceiptError, match="began step 10 in another state"):
        book.take(segment(10, 19, "09", "02"))


def test_T17_a_model_that_is_not_the_one_that_was_signed_is_refused() -> None:
    book = Receipts()
    book.take(segment(0, 9, "00", "01"))
    book.check_state(10, {"w": bytes(32)})

    with pytest.raises(ReceiptError, match="another model"):
        book.check_state(10, {"w": bytes([1]) * 32})


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1, receipts=True) as running:
        yield running


def trainer(node: cloister.LocalNode, folder: Path | None) -> cloister.Trainer:
    torch.manual_seed(0)
    cut = cloister.cut(digits.model(), front="stem", head="head", example=torch.zeros(64, 1, 8, 8))
    return cloister.Trainer(
        cut,
        node=node.address,
        policy=cloister.CLEAR,
        optimizer=cloister.AdamW(lr=2e-3),
        identity=node.owner,
        micro_batches=2,
        checkpoints=None if folder is None else cloister.Checkpoints(folder=folder, every=10),
    )


def test_a_node_signs_every_step_and_the_last_state_is_the_model_that_comes_home(node: cloister.LocalNode) -> None:
    with trainer(node, None) as made:
        made.fit(digits.train_loader(), epochs=4)
        assert made.receipts is not None
        kept = made.receipts.kept
    home = {name: tensor_digest(tensor) for name, tensor in made.cut.middle_state().items()}

    check_chain([each.receipt for each in kept])
    spans = [(each.receipt.segment.first_step, each.receipt.segment.last_step) for each in kept]
    assert spans == [(0, 63), (64, 91)]
    assert kept[-1].model_root == state_root(home)


def test_a_resumed_run_has_one_chain_of_receipts_over_all_its_steps(node: cloister.LocalNode, tmp_path: Path) -> None:
    with trainer(node, tmp_path) as first:
        first.fit(digits.train_loader(), epochs=1)
    with trainer(node, tmp_path) as second:
        second.fit(digits.train_loader(), epochs=2, resume=True)
        assert second.receipts is not None
        kept = second.receipts.kept

    check_chain([each.receipt for each in kept])
    assert (kept[0].receipt.segment.first_step, kept[-1].receipt.segment.last_step) == (0, 45)
    assert len({each.receipt.segment.spec for each in kept}) == 2


def test_a_finished_run_is_on_record_anchored_bundled_and_verified_by_somebody_without_its_data(
    node: cloister.LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLOISTER_LOG", f"sqlite:///{tmp_path / 'log.sqlite'}")
    job = Path(__file__).resolve().parents[1] / "examples" / "digits.toml"
    chosen = {
        "train.epochs": 1,
        "provenance.passphrase_file": passphrase_file(node.owner.folder),
        "provenance.anchor": "dev",
        "node.address": node.address,
        "node.identity": node.owner.folder,
        "output.dir": tmp_path / "run",
    }
    given_ = [part for name, value in chosen.items() for part in ("--set", f"{name}={json.dumps(value, default=str)}")]
    text = job.read_text().replace('certificate = "node/tls.crt"\n', "")
    (tmp_path / "job.toml").write_text(text)
    app(["train", str(tmp_path / "job.toml"), *given_], standalone_mode=False)
    said = capsys.readouterr()
    app(["bundle", str(tmp_path / "run")], standalone_mode=False)
    capsys.readouterr()
    app(
        ["verify", str(tmp_path / "run" / "bundle.zip"), "--model", str(tmp_path / "run" / "model.safetensors")],
        standalone_mode=False,
    )

    folder = tmp_path / "run" / "provenance"
    run = open_record((folder / "run.json").read_bytes()).predicate
    assert isinstance(run, RunRecord)
    (group,) = run.cloister_training.receipts
    lines = (folder / "receipts" / f"{group.root}.jsonl").read_bytes().splitlines()
    check_receipts(group, lines)
    assert group.last_step - group.first_step + 1 == run.cloister_training.steps == 23
    assert str(tmp_path) not in json.dumps(run.build_definition.external_parameters.job)
    assert "final on dev" in said.err
    assert "proven" in capsys.readouterr().out
    for _ in range(2):  # the second takes the first one's place
        app(["card", str(tmp_path / "run"), "--write"], standalone_mode=False)
    assert (tmp_path / "run" / "model-card.md").read_text().count("## Provenance") == 1


def test_T26_foreign_text_is_inert_in_a_card() -> None:
    shown = _cell("<script>alert(1)</script> | [x](javascript:y)\n# `z`")

    assert not set("<>|[]`\n") & set(shown)
    assert html.unescape(shown) == "<script>alert(1)</script> | [x](javascript:y) # `z`"
