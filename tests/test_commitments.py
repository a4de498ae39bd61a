"""Data set commitments: membership, absence, and that hashes tell nothing (THREATS T21, T22)."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from provenance.commitments import (
    Absence,
    Commitment,
    Membership,
    commit,
    load_commitment,
    open_proof,
    proof_bytes,
    prove_absence,
    prove_membership,
)
from provenance.sources import Csv, Files, Items, Npz, Parquet, Source, encode_item, source_of
from wire.errors import ConfigError, ProvenanceError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    for name in ("a/1.txt", "a/2.txt", "a.b", "z.txt", "b/c/d.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def committed(source: Source, tmp_path: Path) -> tuple[Commitment, Path]:
    folder = tmp_path / "kept"
    return commit(source, folder), folder


def test_files_stand_in_the_order_of_their_paths(scans: Path) -> None:
    names = [name for name, _ in Files(scans).records()]

    assert names == sorted(names, key=str.encode) == ["a.b", "a/1.txt", "a/2.txt", "b/c/d.bin", "z.txt"]


def test_each_record_is_proven_alone(scans: Path, tmp_path: Path) -> None:
    public, kept = committed(Files(scans), tmp_path)

    assert (public.records, public.kind, public.order) == (5, "files", "name")
    assert load_commitment(kept) == public
    for which in ("a.b", "a/2.txt", 4):
        proof, content = prove_membership(Files(scans), kept, which)
        handed_on = open_proof(proof_bytes(proof))
        assert isinstance(handed_on, Membership)
        handed_on.check(public, [content])
        assert content.decode() == f"content of {proof.opening.name}"


def test_a_proof_holds_for_no_other_content_name_or_data_set(scans: Path, tmp_path: Path) -> None:
    public, kept = committed(Files(scans), tmp_path)
    proof, content = prove_membership(Files(scans), kept, "a.b")

    with pytest.raises(ProvenanceError, match="content is not the one"):
        proof.check(public, [content + b"!"])
    renamed = dataclasses.replace(proof, opening=dataclasses.replace(proof.opening, name="a.c"))
    with pytest.raises(ProvenanceError, match="does not lead to the root"):
        renamed.check(public, [content])
    other = commit(Files(scans), tmp_path / "again")
    assert other.root != public.root, "salts are drawn anew"
    with pytest.raises(ProvenanceError, match="does not lead to the root"):
        proof.check(other, [content])


def test_T22_no_altered_byte_of_a_proof_passes(scans: Path, tmp_path: Path) -> None:
    public, kept = committed(Files(scans), tmp_path)
    membership, content = prove_membership(Files(scans), kept, "a/1.txt")
    for data in altered(proof_bytes(membership)):
        with pytest.raises(ProvenanceError):
            check_any(data, public, content)
    for data in altered(proof_bytes(prove_absence(Files(scans), kept, "b"))):
        try:
            proof = check_any(data, public, content)
        except ProvenanceError:
            continue
        assert isinstance(proof, Absence)
        assert proof.name != "b", "what passes is a proof for another name, which is absent too, and says so"


def altered(data: bytes) -> Iterator[bytes]:
    for position in range(len(data)):
        bad = bytearray(data)
        bad[position] ^= 1
        yield bytes(bad)


def check_any(data: bytes, public: Commitment, content: bytes) -> Membership | Absence:
    proof = open_proof(data)
    if isinstance(proof, Absence):
        proof.check(public)
    else:
        proof.check(public, [content])
    return proof


def test_T21_what_is_public_does_not_let_a_guess_be_tested(scans: Path, tmp_path: Path) -> None:
    _, kept = committed(Files(scans), tmp_path)
    proof, _ = prove_membership(Files(scans), kept, "a/1.txt")
    absence = prove_absence(Files(scans), kept, "a/15.txt")

    # Whoever knows a neighbour's content exactly finds no hash of it in what was handed on.
    told = proof_bytes(proof) + proof_bytes(absence) + (kept / "commitment.json").read_bytes()
    for name in ("a.b", "a/2.txt", "z.txt"):
        guess = f"content of {name}".encode()
        for entry in (guess, b"\x00" + guess, name.encode() + guess):
            assert hashlib.sha256(entry).hexdigest().encode() not in told
    seed = (kept / "salts.key").read_text().strip()
    assert seed.encode() not in told
    assert (kept / "salts.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["", "a", "a/15.txt", "b/c", "zz", "a.c"])
def test_absence_is_proven_by_two_neighbours(scans: Path, tmp_path: Path, name: str) -> None:
    public, kept = committed(Files(scans), tmp_path)

    proof = open_proof(proof_bytes(prove_absence(Files(scans), kept, name)))

    assert isinstance(proof, Absence)
    proof.check(public)


def test_absence_of_what_is_there_cannot_be_proven(scans: Path, tmp_path: Path) -> None:
    public, kept = committed(Files(scans), tmp_path)
    with pytest.raises(ConfigError, match="is in the data set"):
        prove_absence(Files(scans), kept, "a.b")

    honest = prove_absence(Files(scans), kept, "a/15.txt")
    wide, _ = prove_membership(Files(scans), kept, "z.txt")
    for forged in (
        dataclasses.replace(honest, name="a/2.txt"),
        dataclasses.replace(honest, name="a.b"),
        dataclasses.replace(honest, before=None),
        dataclasses.replace(honest, after=None),
        dataclasses.replace(honest, name="a/2.txt", after=wide.opening),
    ):
        with pytest.raises(ProvenanceError):
            forged.check(public)


def test_a_changed_data_set_proves_nothing(scans: Path, tmp_path: Path) -> None:
    _, kept = committed(Files(scans), tmp_path)
    (scans / "a.b").write_text("other")

    with pytest.raises(ProvenanceError, match="changed since"):
        prove_membership(Files(scans), kept, "a.b")
    with pytest.raises(ConfigError, match="has no record 'nowhere'"):
        prove_membership(Files(scans), kept, "nowhere")


def test_a_commitment_is_never_overwritten_and_an_empty_one_not_made(scans: Path, tmp_path: Path) -> None:
    _, kept = committed(Files(scans), tmp_path)
    with pytest.raises(ConfigError, match="never overwritten"):
        commit(Files(scans), kept)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no records"):
        commit(Files(tmp_path / "empty"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_links_are_refused(scans: Path, tmp_path: Path) -> None:
    (scans / "link").symlink_to("/etc/passwd")

    with pytest.raises(ConfigError, match="is a link"):
        commit(Files(scans), tmp_path / "kept")


def test_rows_of_csv_do_not_depend_on_quoting_and_are_named_by_a_column(tmp_path: Path) -> None:
    plain, quoted = tmp_path / "plain.csv", tmp_path / "quoted.csv"
    plain.write_text('id,text\n1,one\n2,"two, and\nmore"\n')
    quoted.write_bytes(b'\xef\xbb\xbf"id","text"\r\n"1","one"\r\n"2","two, and\nmore"\r\n')
    rows = [[(name, b"".join(content)) for name, content in Csv(p, "id").records()] for p in (plain, quoted)]

    assert rows[0] == rows[1]
    assert rows[0][1] == ("2", b'["id","text"]\n["2","two, and\\nmore"]')
    assert commit(Csv(plain, "id"), tmp_path / "kept").order == "name"
    assert commit(Csv(plain), tmp_path / "positions").order == "position"
    with pytest.raises(ConfigError, match="in no order"):
        prove_absence(Csv(plain), tmp_path / "positions", "3")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"a,b\n1\n", "row 1 has 1 fields"), (b"a\n\xff\n", "no CSV in UTF-8"), (b'a\n"x', "no CSV")],
)
def test_a_csv_that_is_none_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        list(Csv(tmp_path / "x.csv").records())


def test_rows_of_npz_are_those_of_its_arrays_compressed_or_not(tmp_path: Path) -> None:
    x, y = np.arange(12, dtype="f4").reshape(4, 3), np.array([3, 1, 4, 1], dtype=">i2")
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez_compressed(tmp_path / "b.npz", y=y.astype("<i2"), x=x)
    rows = [[b"".join(c) for _, c in Npz(tmp_path / name).records()] for name in ("a.npz", "b.npz")]

    assert rows[0] == rows[1]
    assert rows[0][2] == b"".join(encode_item({"x": x[2], "y": np.asarray(y[2])}))
    np.savez(tmp_path / "c.npz", x=x, y=y[:2])
    with pytest.raises(ConfigError, match="must be of one length"):
        list(Npz(tmp_path / "c.npz").records())
    np.savez(tmp_path / "d.npz", x=np.array([{}, {}], dtype=object))
    with pytest.raises(ConfigError, match="no rows to commit to"):
        list(Npz(tmp_path / "d.npz").records())
    (tmp_path / "e.npz").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="no npz file"):
        list(Npz(tmp_path / "e.npz").records())


def test_rows_of_parquet_are_mappings(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": ["a", "b"], "v": [1.5, None]}), tmp_path / "x.parquet")

    rows = [(name, b"".join(content)) for name, content in Parquet(tmp_path / "x.parquet", "id").records()]

    assert rows == [
        ("a", b"".join(encode_item({"id": "a", "v": 1.5}))),
        ("b", b"".join(encode_item({"id": "b", "v": None}))),
    ]
    with pytest.raises(ConfigError, match="0 columns 'no'"):
        list(Parquet(tmp_path / "x.parquet", "no").records())


def test_items_of_a_pytorch_dataset_are_committed_to(tmp_path: Path) -> None:
    dataset = TensorDataset(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 1]))
    public, kept = committed(Items(dataset), tmp_path)

    proof, content = prove_membership(Items(dataset), kept, 1)

    proof.check(public, [content])
    assert content == b"".join(encode_item((torch.tensor([2.0, 3.0]), torch.tensor(1))))
    assert b"".join(encode_item(torch.ones(2))) == b"".join(encode_item(np.ones(2, "f4")))
    assert b"bfloat16|2|" in b"".join(encode_item(torch.ones(2, dtype=torch.bfloat16)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(one=JSON, other=JSON)
def test_different_items_have_different_encodings(one: object, other: object) -> None:
    same = b"".join(encode_item(one)) == b"".join(encode_item(other))

    assert same == (repr_of(one) == repr_of(other))


def repr_of(item: object) -> str:
    """What tells items apart: ``1``, ``True`` and ``1.0`` are three things, the order of keys is none."""
    if isinstance(item, dict):
        return f"{{{','.join(f'{k!r}:{repr_of(item[k])}' for k in sorted(item))}}}"
    return f"[{','.join(map(repr_of, item))}]" if isinstance(item, list) else repr(item)


def test_what_has_no_encoding_is_refused() -> None:
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    for item in (object(), deep, np.array([{}], dtype=object), {"a": lambda: 0}):
        with pytest.raises(ConfigError):
            encode_item(item)
    with pytest.raises(ConfigError, match="neither items nor an iterator"):
        list(Items(7).records())


def test_a_source_is_chosen_by_its_suffix(tmp_path: Path) -> None:
    for name, kind in (("a.csv", Csv), ("a.npz", Npz), ("a.parquet", Parquet), ("a.bin", Files)):
        (tmp_path / name).touch()
        assert isinstance(source_of(tmp_path / name), kind)
    with pytest.raises(ConfigError, match="does not exist"):
        source_of(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no columns"):
        source_of(tmp_path / "a.bin", key="id")


@pytest.mark.parametrize("hostile", [b"", b"{}", b"[]", b'{"proof":"membership"}', b"[" * 9999, b"x" * 300_000])
def test_T02_a_hostile_proof_gets_the_documented_error(hostile: bytes) -> None:
    with pytest.raises(ProvenanceError):
        open_proof(hostile)


def test_a_large_file_is_read_in_constant_memory(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(512 * 2**20)
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from provenance.commitments import commit\nfrom provenance.sources import Files\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"commit(Files(Path({str(tmp_path / 'large')!r})), Path({str(tmp_path / 'kept')!r}))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)

    assert int(done.stdout) < 32  # MiB
