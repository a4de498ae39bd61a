"""Bundles: one encoding, bounded, and no flipped byte passes (THREATS T20, T22, T26)."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from provenance.bundle import Bundle, bundle_bytes, load_bundle, parse_bundle, save_bundle
from provenance.envelope import canonical
from provenance.verification import verify
from tests.bundles import small
from wire.errors import ConfigError, ProvenanceError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, bytes, Path]:
    owner, run, model = small(tmp_path_factory.mktemp("small"))
    bundle = owner.bundle(run)
    return bundle, bundle_bytes(bundle), model


def unpacked(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(files: dict[str, bytes], *, manifest: bool = False, how: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as Cloister writes it; with ``manifest``, one that agrees with what was altered."""
    if manifest:
        told = json.loads(files["bundle.json"])
        told["files"] = [
            {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in sorted(files.items())
            if name != "bundle.json"
        ]
        files = files | {"bundle.json": canonical(told)}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr, entry.compress_type = 3, 0o644 << 16, how
            archive.writestr(entry, files[name])
    return made.getvalue()


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def refusal(data: bytes) -> str:
    """What is said of a bundle that does not verify, in whatever step that is found; nothing of one that does."""
    try:
        report = verify(parse_bundle(data))
    except ProvenanceError as error:
        return str(error)
    return "; ".join(f"{claim.part}: {claim.claim}" for claim in report.claims if claim.verdict == "fails")


def test_a_bundle_comes_back_as_it_was_and_is_the_same_bytes_each_time(made: tuple[Bundle, bytes, Path]) -> None:
    bundle, data, _ = made

    again = parse_bundle(data)
    assert again == bundle
    assert bundle_bytes(again) == data == packed(unpacked(data))


def test_a_whole_bundle_verifies(made: tuple[Bundle, bytes, Path]) -> None:
    report = verify(made[0], model=made[2])

    assert {claim.verdict for claim in report.claims} == {"holds", "unknown"}
    (unknown,) = [claim for claim in report.claims if claim.verdict == "unknown"]
    assert "no chain shows when" in unknown.claim
    assert any(claim.part == "model file" and claim.basis == "proven" for claim in report.claims)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80])
def test_T22_a_flipped_byte_anywhere_in_the_file_is_refused_with_the_parts_name(
    made: tuple[Bundle, bytes, Path], mask: int
) -> None:
    data = made[1]

    for at in range(len(data)):
        with pytest.raises(ProvenanceError, match="bundle") as refused:
            parse_bundle(flipped(data, at, mask))
        assert str(refused.value)


def test_T22_a_flipped_byte_in_a_file_of_a_zip_that_is_right_is_refused_with_the_files_name(
    made: tuple[Bundle, bytes, Path],
) -> None:
    files = unpacked(made[1])

    for name, content in files.items():
        for at in range(len(content)):
            with pytest.raises(ProvenanceError) as refused:
                parse_bundle(packed(files | {name: flipped(content, at, 0x01)}))
            assert name in str(refused.value) or name == "bundle.json", (name, at, str(refused.value))


def test_T22_a_flipped_byte_that_the_manifest_was_made_to_agree_with_is_found_by_the_proofs(
    made: tuple[Bundle, bytes, Path],
) -> None:
    files = unpacked(made[1])

    for name, content in files.items():
        if name == "bundle.json":
            continue
        for at in range(len(content)):
            altered = files | {name: flipped(content, at, 0x01)}
            if name.startswith("records/"):  # and its name with it
                content_now = altered.pop(name)
                altered[f"records/{hashlib.sha256(content_now).hexdigest()}.json"] = content_now
            assert refusal(packed(altered, manifest=True)), (name, at)


@pytest.mark.parametrize("at", [0, 9, 40, -1])
def test_T22_a_flipped_byte_in_the_model_file_is_found(
    made: tuple[Bundle, bytes, Path], at: int, tmp_path: Path
) -> None:
    content = made[2].read_bytes()
    altered = tmp_path / "model.safetensors"
    altered.write_bytes(flipped(content, at % len(content), 0x01))

    claims = verify(made[0], model=altered).claims
    assert [claim.verdict for claim in claims if claim.part == "model file"] == ["fails"]


def _bomb(files: dict[str, bytes]) -> bytes:
    return packed(files | {"receipts/" + 64 * "0" + ".jsonl": bytes(2**24)}, manifest=True, how=zipfile.ZIP_DEFLATED)


def _named(name: str) -> Callable[[dict[str, bytes]], bytes]:
    return lambda files: packed(files | {name: b"x"}, manifest=True)


def _many(files: dict[str, bytes]) -> bytes:
    return packed(files | {f"records/{number:064x}.json": b"" for number in range(10_001)}, manifest=True)


def _deep(files: dict[str, bytes]) -> bytes:
    deep = b"[" * 100_000 + b"]" * 100_000
    return packed(files | {"bundle.json": deep})


def _deep_record(files: dict[str, bytes]) -> bytes:
    deep = b"[" * 100_000 + b"]" * 100_000
    return packed(files | {f"records/{hashlib.sha256(deep).hexdigest()}.json": deep}, manifest=True)


def _twice(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("bundle.json", files["bundle.json"])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("bundle.json", files["bundle.json"])
    return made.getvalue()


def _overlapping(files: dict[str, bytes]) -> bytes:
    """Thousands of entries that are all the same bytes: small to send, large to read."""
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w") as archive:
        archive.writestr("records/" + 64 * "0" + ".json", bytes(2**20))
    data = one.getvalue()
    start = data.index(b"PK\x01\x02")
    entry, count = data[start:-22], 5_000
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(entry) * count, start, 0)
    del files
    return data[:start] + entry * count + end


def _claiming(files: dict[str, bytes]) -> bytes:
    data = packed(files)
    return data[:-14] + struct.pack("<HH", 65_535, 65_535) + data[-10:]


def _zip64(files: dict[str, bytes]) -> bytes:
    data = packed(files)
    return data[:-22] + struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 1) + data[-22:]


HOSTILE: list[tuple[Callable[[dict[str, bytes]], bytes], str]] = [
    (_bomb, "larger than the bundle"),
    (lambda files: packed(files, how=zipfile.ZIP_DEFLATED), "packed|larger"),
    (_named("../../etc/passwd"), "no part of a bundle"),
    (_named("/etc/passwd"), "no part of a bundle"),
    (_named("records/" + 64 * "A" + ".json"), "no part of a bundle"),
    (_named("logs/" + 64 * "a" + "/head.json"), "lacks its head or its proofs"),
    (_many, "10005|at most 10000"),
    (_deep, "no JSON"),
    (_deep_record, "record"),
    (_twice, "no part of a bundle"),
    (_overlapping, "larger than the bundle"),
    (_claiming, "65535"),
    (_zip64, "no zip archive"),
    (lambda _: b"", "no zip"),
    (lambda _: b"PK\x05\x06" + bytes(18), "directory|bundle.json"),
    (lambda _: bytes(64 * 2**20 + 1), "no bundle is that large"),
    (lambda files: packed(files) + b"x", "something behind its end"),
    (lambda files: b"x" + packed(files), "altered"),
    (lambda files: packed({**files, "bundle.json": b"{}"}), "bundle.json"),
]


@pytest.mark.parametrize(("make", "said"), HOSTILE, ids=[str(number) for number in range(len(HOSTILE))])
def test_T26_a_hostile_file_is_refused(
    made: tuple[Bundle, bytes, Path], make: Callable[[dict[str, bytes]], bytes], said: str
) -> None:
    refused = refusal(make(unpacked(made[1])))

    assert re.search(said, refused), refused


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_bundle(tmp_path / "none.zip")


def test_a_bundle_holds_what_bears_on_its_run_and_nothing_else(tmp_path: Path) -> None:
    owner, _, _ = small(tmp_path)
    other = owner.run("0b" * 32, ["others"], name="another")
    data = owner.dataset("unrelated")

    bundle = owner.bundle(other)

    assert hashlib.sha256(data).hexdigest() not in bundle.records
    assert len(bundle.records) == 2  # itself, and its node
    assert save_bundle(bundle, tmp_path / "b.zip") == (tmp_path / "b.zip").stat().st_size
