"""RFC 9162's tree: its vectors, its laws, and that no altered proof passes (THREATS T20)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provenance.merkle import (
    EMPTY_ROOT,
    Frontier,
    check_consistency,
    check_inclusion,
    consistency_ranges,
    cover,
    inclusion_ranges,
    leaf_hash,
    node_hash,
    range_root,
    root_of,
)
from wire.errors import ProvenanceError

# The vectors of the Certificate Transparency project, for the same tree.
ENTRIES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAVES = [leaf_hash(bytes.fromhex(entry)) for entry in ENTRIES]


def slow_root(leaves: list[bytes]) -> bytes:
    """RFC 9162, 2.1.1, word for word."""
    if not leaves:
        return EMPTY_ROOT
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return node_hash(slow_root(leaves[:split]), slow_root(leaves[split:]))


def inclusion(leaves: list[bytes], index: int) -> list[bytes]:
    return [slow_root(leaves[start:end]) for start, end in inclusion_ranges(index, len(leaves))]


def consistency(leaves: list[bytes], first: int) -> list[bytes]:
    return [slow_root(leaves[start:end]) for start, end in consistency_ranges(first, len(leaves))]


def test_roots_are_those_of_the_vectors() -> None:
    assert [root_of(LEAVES[:size]).hex() for size in range(1, 9)] == ROOTS
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_proofs_are_those_of_the_vectors() -> None:
    assert [node.hex() for node in inclusion(LEAVES, 0)] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]
    assert [node.hex() for node in consistency(LEAVES, 6)] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


def test_every_proof_of_every_small_tree_holds_and_holds_for_no_other_leaf_or_size() -> None:
    leaves = [leaf_hash(bytes([i])) for i in range(20)]
    for size in range(1, 21):
        root = slow_root(leaves[:size])
        for index in range(size):
            path = inclusion(leaves[:size], index)
            check_inclusion(leaves[index], index, size, path, root)
            for wrong in set(range(size)) - {index}:
                with pytest.raises(ProvenanceError):
                    check_inclusion(leaves[index], wrong, size, path, root)
        for first in range(1, size + 1):
            path = consistency(leaves[:size], first)
            check_consistency(first, slow_root(leaves[:first]), size, root, path)
            for wrong in set(range(1, size + 1)) - {first}:
                with pytest.raises(ProvenanceError):
                    check_consistency(wrong, slow_root(leaves[:first]), size, root, path)


@settings(deadline=None)
@given(size=st.integers(1, 300), data=st.data())
def test_T20_an_altered_proof_is_refused(size: int, data: st.DataObject) -> None:
    leaves = [leaf_hash(i.to_bytes(2, "big")) for i in range(size)]
    root, index, first = root_of(leaves), data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    path, old = inclusion(leaves, index), root_of(leaves[:first])
    steps = consistency(leaves, first)
    check_inclusion(leaves[index], index, size, path, root)
    check_consistency(first, old, size, root, steps)

    for proof in (path, steps):
        for position in range(len(proof)):
            bit = data.draw(st.integers(0, 255))
            node = bytearray(proof[position])
            node[bit // 8] ^= 1 << bit % 8
            bad = [*proof[:position], bytes(node), *proof[position + 1 :]]
            with pytest.raises(ProvenanceError):  # noqa: PT012 - one check of the two
                if proof is path:
                    check_inclusion(leaves[index], index, size, bad, root)
                else:
                    check_consistency(first, old, size, root, bad)
    for bad in ([*path, root], path[:-1]):
        if bad != path:
            with pytest.raises(ProvenanceError):
                check_inclusion(leaves[index], index, size, bad, root)
    for bad in ([*steps, root], steps[:-1]):
        if bad != steps:
            with pytest.raises(ProvenanceError):
                check_consistency(first, old, size, root, bad)


@settings(deadline=None)
@given(size=st.integers(0, 500))
def test_a_streamed_tree_is_the_recursive_one_and_its_nodes_prove_it(size: int) -> None:
    leaves = [leaf_hash(i.to_bytes(2, "big")) for i in range(size)]
    nodes: dict[tuple[int, int], bytes] = {}
    frontier = Frontier(on_node=lambda level, index, node: nodes.__setitem__((level, index), node))
    for leaf in leaves:
        frontier.append(leaf)

    assert frontier.root() == slow_root(leaves)
    assert range_root((0, size), lambda level, index: nodes[level, index]) == slow_root(leaves)
    assert len(nodes) == 2 * size - size.bit_count()


@settings(deadline=None)
@given(size=st.integers(0, 200), more=st.integers(0, 60))
def test_a_frontier_goes_on_from_its_subtrees(size: int, more: int) -> None:
    leaves = [leaf_hash(i.to_bytes(2, "big")) for i in range(size + more)]
    roots = [slow_root(leaves[index << level : (index + 1) << level]) for level, index in cover((0, size))]

    frontier = Frontier(size, roots)
    for leaf in leaves[size:]:
        frontier.append(leaf)

    assert frontier.root() == slow_root(leaves)


def test_senseless_proofs_are_refused_and_end() -> None:
    for index, size in itertools.product((-1, 0, 1, 2**70), (0, -5, 1, 2**60)):
        if (index, size) != (0, 1):
            with pytest.raises(ProvenanceError):
                check_inclusion(LEAVES[0], index, size, [], LEAVES[0])
    with pytest.raises(ProvenanceError, match="no list of at most"):
        check_inclusion(LEAVES[0], 0, 8, [b"short"], LEAVES[0])
    with pytest.raises(ProvenanceError, match="no list of at most"):
        check_consistency(1, LEAVES[0], 2, LEAVES[1], [LEAVES[0]] * 1000)
    with pytest.raises(ProvenanceError, match="the log was rewritten"):
        check_consistency(3, LEAVES[0], 3, LEAVES[1], [])
