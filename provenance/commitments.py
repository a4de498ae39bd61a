"""A data set's commitment: one salted Merkle root, of which single records can be opened, or shown to be absent.

A leaf is over the record's salt, its name and the salted digest of its content. Salts come from one secret seed
(HMAC-SHA-512 of the record's number), so that the owner keeps 32 bytes, and an opened record says nothing of any other:
without its salt no hash lets anybody test a guess (T21). Where names are in order, two neighbours around a missing name
prove its absence; they open their names, not their contents.

The seed is as good as the data's own secrecy: it stays with the owner, and whoever loses it can prove nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from provenance.envelope import canonical, parse_json
from provenance.merkle import HASH_BYTES, MAX_LEAVES, Frontier, check_inclusion, inclusion_ranges, leaf_hash
from provenance.sources import Source
from wire.errors import ConfigError, IdentityError, ProvenanceError
from wire.files import read_bounded, sync_folder, write_private

__all__ = [
    "Absence",
    "Commitment",
    "Membership",
    "Opening",
    "commit",
    "load_commitment",
    "open_proof",
    "proof_bytes",
    "prove_absence",
    "prove_membership",
    "recommit",
]

_SEED_FILE: Final = "salts.key"
_FACTS_FILE: Final = "commitment.json"
_LEAVES_FILE: Final = "leaves.bin"
_DOMAIN: Final = b"cloister dataset v1\x00"
_MAX_PROOF_BYTES: Final = 256 * 1024  # two names of 64 KiB
_MAX_NAME_BYTES: Final = 64 * 1024

Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Index = Annotated[int, Field(ge=0, lt=MAX_LEAVES)]
_CONFIG: Final = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commitment:
    """What is public of a data set.

    Attributes:
        root: RFC 9162's, over the records' leaves, in hexadecimal.
        records: how many.
        kind: what they are.
        order: ``name`` where their names grow strictly (as UTF-8), so that absence can be proven.
    """

    __pydantic_config__: ClassVar = _CONFIG
    root: Hex32
    records: Annotated[int, Field(ge=1, le=MAX_LEAVES)]
    kind: Literal["files", "csv", "parquet", "npz", "items"]
    order: Literal["name", "position"]
    version: Literal[1] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """One leaf, and its way to the root.

    Attributes:
        index: its number.
        name: of the record.
        salt: of the leaf.
        content: salted digest of the record's content.
        path: RFC 9162 inclusion proof.
    """

    __pydantic_config__: ClassVar = _CONFIG
    index: Index
    name: Annotated[str, StringConstraints(max_length=_MAX_NAME_BYTES)]
    salt: Hex32
    content: Hex32
    path: Annotated[list[Hex32], Field(max_length=64)]

    def check(self, commitment: Commitment) -> None:
        """Raises: ProvenanceError unless it is a leaf of that commitment."""
        leaf = _leaf(bytes.fromhex(self.salt), self.name, bytes.fromhex(self.content))
        path = [bytes.fromhex(node) for node in self.path]
        check_inclusion(leaf, self.index, commitment.records, path, bytes.fromhex(commitment.root))


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Proof that a record is in the data set; it opens this one and says nothing of others but how many there are."""

    __pydantic_config__: ClassVar = _CONFIG
    opening: Opening
    content_salt: Hex32
    proof: Literal["membership"] = "membership"

    def check(self, commitment: Commitment, content: Iterable[bytes]) -> None:
        """Raises: ProvenanceError unless it proves that the record with this content is in the data set."""
        if _content(bytes.fromhex(self.content_salt), content).hex() != self.opening.content:
            raise ProvenanceError("the record's content is not the one that was committed to")
        self.opening.check(commitment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Absence:
    """Proof that no record has this name, where names are in order: its neighbours stand side by side.

    That the names are in order is what the owner signs: who breaks it signed something false, and any two leaves out
    of order prove that.
    """

    __pydantic_config__: ClassVar = _CONFIG
    name: Annotated[str, StringConstraints(max_length=_MAX_NAME_BYTES)]
    before: Opening | None
    after: Opening | None
    proof: Literal["absence"] = "absence"

    def check(self, commitment: Commitment) -> None:
        """Raises: ProvenanceError unless it proves that the name is not in the data set."""
        if commitment.order != "name":
            raise ProvenanceError("this data set's records are in no order of names: absence cannot be proven")
        for opening in (self.before, self.after):
            if opening is not None:
                opening.check(commitment)
        before, after = self.before, self.after
        first = 0 if before is None else before.index + 1
        if first != (commitment.records if after is None else after.index):
            raise ProvenanceError("the two records are no neighbours: others stand between them")
        wanted = self.name.encode()
        if (before and before.name.encode() >= wanted) or (after and after.name.encode() <= wanted):
            raise ProvenanceError(f"{self.name!r} does not stand between its neighbours")


_COMMITMENT: Final = TypeAdapter(Commitment)
_PROOF: Final[TypeAdapter[Any]] = TypeAdapter(Annotated[Membership | Absence, Field(discriminator="proof")])


def commit(source: Source, folder: Path, *, on_record: Callable[[], None] = lambda: None) -> Commitment:
    """Commits to a data set, and keeps what proofs need in a new folder: the seed (secret) and the leaves.

    Args:
        source: the data set.
        folder: a folder that does not exist yet.
        on_record: called after each record, for a progress bar.

    Raises:
        ConfigError: the data set is empty or cannot be read; or the folder holds something.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists: a commitment is never overwritten, its seed cannot be made again")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
        ) as at:
            partial = Path(at) / "new"
            partial.mkdir(mode=0o700)
            made = _hashed(source, partial, on_record)
            sync_folder(partial)
            partial.rename(folder)
            sync_folder(folder.parent)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror}") from error
    return made


def _hashed(source: Source, folder: Path, on_record: Callable[[], None]) -> Commitment:
    """Fills a folder with the commitment; nothing but the file of leaves grows with the data set."""
    seed, frontier, last = secrets.token_bytes(32), Frontier(), b""
    order: Literal["name", "position"] = "name"
    with (folder / _LEAVES_FILE).open("xb") as leaves:
        for index, (name, content) in enumerate(source.records()):
            leaf_salt, content_salt = _salts(seed, index)
            key = name.encode()
            if len(key) > _MAX_NAME_BYTES:
                raise ConfigError(f"the name of record {index} has {len(key)} bytes; at most {_MAX_NAME_BYTES}")
            if key <= last:  # also where there is no name
                order = "position"
            last = key
            leaf = _leaf(leaf_salt, name, _content(content_salt, content))
            leaves.write(leaf)
            frontier.append(leaf)
            on_record()
        leaves.flush()
        os.fsync(leaves.fileno())
    if not frontier.size:
        raise ConfigError("the data set has no records: there is nothing to commit to")
    made = Commitment(root=frontier.root().hex(), records=frontier.size, kind=source.kind, order=order)
    write_private(folder / _SEED_FILE, seed.hex().encode() + b"\n")
    write_private(folder / _FACTS_FILE, canonical(_COMMITMENT.dump_python(made)) + b"\n")
    return made


def load_commitment(folder: Path) -> Commitment:
    """The commitment that a folder keeps.

    Raises:
        ConfigError: it keeps none.
    """
    try:
        text = read_bounded(folder / _FACTS_FILE)
        return _COMMITMENT.validate_json(text)
    except (IdentityError, ValidationError) as error:
        raise ConfigError(f"{folder} keeps no commitment: make one with `cloister dataset commit`") from error


def recommit(source: Source, folder: Path) -> Commitment:
    """Hashes a data set again with the seed that a folder keeps: the commitment that it would have today.

    Raises:
        ConfigError: the folder keeps none, or the data set cannot be read.
        ProvenanceError: a record is not what was committed to; names the first.
    """
    kept, seed = load_commitment(folder), _seed(folder)
    frontier = Frontier()
    with (folder / _LEAVES_FILE).open("rb") as leaves:
        for index, (name, content) in enumerate(source.records()):
            leaf_salt, content_salt = _salts(seed, index)
            leaf = _leaf(leaf_salt, name, _content(content_salt, content))
            if leaf != leaves.read(HASH_BYTES):
                raise ProvenanceError(
                    f"record {index} ({name[:100]!r}) of the data set is not what was committed to: altered since?"
                )
            frontier.append(leaf)
    if frontier.root().hex() != kept.root:
        raise ProvenanceError(f"the data set has {frontier.size} records, and not the root that was committed to")
    return kept


def prove_membership(source: Source, folder: Path, which: int | str) -> tuple[Membership, bytes]:
    """Opens one record, by its number or its name.

    Returns:
        The proof, and the content that it goes with.

    Raises:
        ConfigError: there is no such record.
        ProvenanceError: the record is not what was committed to.
    """
    commitment = load_commitment(folder)
    for index, (name, content) in enumerate(source.records()):
        if which == (index if isinstance(which, int) else name):
            data = b"".join(content)
            opening, salt = _opened(folder, commitment, index, name, (data,))
            return Membership(opening=opening, content_salt=salt.hex()), data
    raise ConfigError(f"the data set has no record {which!r}; `cloister dataset prove-absent` proves that of a name")


def prove_absence(source: Source, folder: Path, name: str) -> Absence:
    """Opens the names on both sides of one that is not there.

    Raises:
        ConfigError: the name is there, or the names are in no order.
        ProvenanceError: the data set is not what was committed to.
    """
    commitment = load_commitment(folder)
    if commitment.order != "name":
        raise ConfigError("this data set's records are in no order of names, so absence cannot be proven")
    before: tuple[int, str, Iterable[bytes]] | None = None
    after: tuple[int, str, Iterable[bytes]] | None = None
    for index, (found, content) in enumerate(source.records()):
        if found == name:
            raise ConfigError(f"{name!r} is in the data set: `cloister dataset prove` opens it")
        if found.encode() > name.encode():
            after = (index, found, content)
            break
        before = (index, found, content)
    sides = [None if side is None else _opened(folder, commitment, *side)[0] for side in (before, after)]
    return Absence(name=name, before=sides[0], after=sides[1])


def proof_bytes(proof: Membership | Absence) -> bytes:
    """A proof as it is handed on: canonical JSON."""
    return canonical(_PROOF.dump_python(proof))


def open_proof(data: bytes) -> Membership | Absence:
    """The proof in a file, which may be anybody's.

    Raises:
        ProvenanceError: it is none.
    """
    try:
        parse_json(data, "the proof", limit=_MAX_PROOF_BYTES)
        found: Membership | Absence = _PROOF.validate_json(data)
    except ValidationError as error:
        raise ProvenanceError(f"this is no proof: {error.errors(include_url=False)[0]['msg'][:200]}") from error
    return found


def _opened(
    folder: Path, commitment: Commitment, index: int, name: str, content: Iterable[bytes]
) -> tuple[Opening, bytes]:
    seed = _seed(folder)
    leaf_salt, content_salt = _salts(seed, index)
    digest = _content(content_salt, content)
    opening = Opening(
        index=index,
        name=name,
        salt=leaf_salt.hex(),
        content=digest.hex(),
        path=[node.hex() for node in _path(folder / _LEAVES_FILE, index, commitment.records)],
    )
    try:
        opening.check(commitment)
    except ProvenanceError as error:
        raise ProvenanceError(
            f"record {index} ({name!r}) is not what was committed to: the data set was changed since"
        ) from error
    return opening, content_salt


def _seed(folder: Path) -> bytes:
    try:
        return bytes.fromhex(read_bounded(folder / _SEED_FILE, private=True).decode("ascii"))
    except ValueError as error:
        raise ConfigError(f"{folder / _SEED_FILE} is damaged: restore it from your backup") from error


def _path(leaves: Path, index: int, size: int) -> list[bytes]:
    """The inclusion proof, from the leaves on disk: one pass over them, log n of them in memory."""
    spans = inclusion_ranges(index, size)
    frontiers = {span: Frontier() for span in spans}
    try:
        with leaves.open("rb") as file:
            for (start, end), frontier in frontiers.items():
                file.seek(start * HASH_BYTES)
                for _ in range(end - start):
                    frontier.append(file.read(HASH_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {leaves}: {error.strerror}; restore it from your backup") from error
    return [frontiers[span].root() for span in spans]


def _salts(seed: bytes, index: int) -> tuple[bytes, bytes]:
    both = hmac.digest(seed, index.to_bytes(8, "big"), "sha512")
    return both[:32], both[32:]


def _content(salt: bytes, content: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256(salt)
    for block in content:
        digest.update(block)
    return digest.digest()


def _leaf(salt: bytes, name: str, content: bytes) -> bytes:
    key = name.encode()
    return leaf_hash(_DOMAIN + salt + len(key).to_bytes(4, "big") + key + content)
