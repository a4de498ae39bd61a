"""The short form of ``python -m tests.fuzz_ciphertexts``, and what its counting is worth."""

from __future__ import annotations

import pytest

from client_side import encrypted
from client_side.spawn import LocalNode
from tests import fuzz_ciphertexts
from tests.fuzz_ciphertexts import SHIFTED, fuzz_node, fuzz_owner


def test_T17_an_owner_ends_every_malformed_answer_in_a_documented_error() -> None:
    tally = fuzz_owner(270, seed=1)

    assert tally.wrong == []
    assert tally.honest > 10
    assert {"MessageRejectedError", "TamperingSuspectedError"} <= {end for _, end in tally.ends}


def test_T02_T17_a_node_ends_every_malformed_request_in_a_documented_error(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with LocalNode(tmp_path_factory.mktemp("node"), threads=1) as node:
        tally = fuzz_node(260, node, seed=1)

    assert tally.wrong == []
    assert tally.honest > 10
    assert {"MESSAGE_REJECTED", "answered"} <= {end for _, end in tally.ends}


@pytest.mark.parametrize("check", ["check_results", "check_products"])
def test_T17_the_fuzz_finds_an_owner_who_does_not_look_at_what_was_decrypted(
    check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encrypted, check, lambda *_, **__: None)
    if check == "check_results":
        monkeypatch.setattr(encrypted, "check_products", lambda *_, **__: None)
        monkeypatch.setattr(encrypted, "check_probes", lambda *_, **__: None)
    kinds = ["a bit of a word", "ciphertexts permuted"]
    monkeypatch.setattr(fuzz_ciphertexts, "_kinds", lambda *_: kinds)

    tally = fuzz_owner(4, seed=2)

    assert any("accepted, and wrong" in line for line in tally.wrong)


def test_T17_one_rows_result_cannot_be_shifted_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that the owner happens to compute itself gives it away: 32 draws among 24 rows."""
    owner = fuzz_ciphertexts._Owner(send_weights=True)
    monkeypatch.setattr(fuzz_ciphertexts, "_kinds", lambda *_: [SHIFTED])
    monkeypatch.setattr(fuzz_ciphertexts, "_Owner", lambda **_: owner)

    ends = fuzz_owner(40, seed=3).ends

    assert set(ends) <= {(SHIFTED, "TamperingSuspectedError"), (SHIFTED, "accepted, and wrong")}
    assert 20 <= ends[SHIFTED, "TamperingSuspectedError"] <= 38  # 40 · (1 - (23/24)^32) = 29.7 ± 2.8
