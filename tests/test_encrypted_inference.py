"""Evaluation and prediction under encryption through a real node: the numbers, what leaves, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cloister
from client_side import encrypted_inference, stream
from client_side.encrypted_inference import EncryptedInference, inference_scheme
from privacy.ckks.layer import LayerBound, unpack_rows
from privacy.policy import Ckks, CkksInference, Clear, Policy
from protos import encryption_pb2, node_pb2
from wire.affine import MAX_MATRIX, affine_layers, check_light
from wire.errors import (
    CloisterError,
    ConfigError,
    LimitExceededError,
    MessageRejectedError,
    NonFiniteError,
    ReleaseRefusedError,
    SpecRejectedError,
    TamperingSuspectedError,
)

FEATURES, HIDDEN, CLASSES, RECORDS = 12, 16, 3, 320
ENCRYPTED = Policy(activations=Clear(), inference=CkksInference())


class Net(nn.Module):
    def __init__(self, middle: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
        self.mid = middle
        self.head = head or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.mid(self.front(x)))
        return made


def net(middle: nn.Module | None = None, head: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    return Net(middle or nn.Linear(HIDDEN, CLASSES), head).eval()


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(HIDDEN, 24), nn.ReLU(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, CLASSES))


def convolutional() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(2),
        nn.Conv1d(4, 3, 2, stride=2),
        nn.Sigmoid(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    ).eval()


class Residual(nn.Module):
    """Each record is four tokens; what a layer adds is added here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm, self.one, self.two = nn.LayerNorm(4), nn.Linear(4, 9), nn.Linear(9, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.unflatten(1, (4, 4))
        made: torch.Tensor = (tokens + self.two(torch.tanh(self.one(self.norm(tokens))))).flatten(1)
        return made


def records(count: int = RECORDS) -> torch.Tensor:
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as found:
        yield found


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[cloister.Ledger]:
    with contextlib.closing(cloister.Ledger(f"sqlite:///{tmp_path / 'privacy.sqlite'}")) as found:
        yield found


@contextlib.contextmanager
def training(
    node: cloister.LocalNode, ledger: cloister.Ledger, model: nn.Module, policy: Policy = ENCRYPTED, **more: Any
) -> Iterator[cloister.Trainer]:
    more.setdefault("head", "head")
    cut = cloister.cut(model, front="front", head=more.pop("head"), example=torch.randn(4, FEATURES))
    with cloister.Trainer(
        cut,
        node=node.address,
        identity=node.owner,
        policy=policy,
        optimizer=cloister.SGD(lr=0.3),
        ledger=ledger,
        **more,
    ) as trainer:
        yield trainer


def within(model: Net, block_rows: int, *middle: Any) -> float:
    """How far the last of several linear layers with activations of slope 1 (GELU: 1.13) may err in all."""
    scheme = inference_scheme(
        cloister.cut(model, front="front", head="head", example=torch.randn(4, FEATURES)), CkksInference()
    )
    error = 0.0  # L2, of a row
    with torch.no_grad():
        smashed = model.front(records())
        for layer in middle:
            norm = float(layer.weight.norm(dim=1).max())
            alone = LayerBound.of(scheme, features=layer.in_features, weight_norm=norm, block_rows=block_rows).total
            longest = float(smashed.norm(dim=1).max()) + error
            each = alone * longest / scheme.row_norm + norm * error
            error = 1.13 * each * layer.out_features**0.5
            smashed = nn.functional.relu(layer(smashed))
    return error


def test_one_layer_is_evaluated_under_encryption_within_the_derived_bound(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    model = net()
    with training(node, ledger, model) as trainer:
        made = trainer.predict(records())

    bound = within(model, 2048, model.mid)
    error = float((made - model(records())).detach().abs().max())
    assert 0 < error < bound < 1e-3
    assert error > bound / 1000  # a bound that says nothing would hold as well


def test_a_deeper_middle_is_evaluated_layer_by_layer_within_the_composed_bound(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    model = net(deep())
    with training(node, ledger, model) as trainer:
        made = trainer.predict(records())

    bound = within(model, 2048, *(m for m in model.mid.children() if isinstance(m, nn.Linear)))
    assert 0 < float((made - model(records())).detach().abs().max()) < bound < 1e-2


@pytest.mark.parametrize("middle", [convolutional, Residual])
@pytest.mark.parametrize("send_weights", [True, False])
def test_convolutions_pooling_tokens_and_residuals_are_evaluated_under_encryption(
    node: cloister.LocalNode,
    ledger: cloister.Ledger,
    middle: Any,
    send_weights: bool,  # noqa: FBT001
) -> None:
    model = net(middle())
    policy = Policy(activations=Clear(), inference=CkksInference(send_weights=send_weights))
    if not send_weights and middle is convolutional:
        with training(node, ledger, model, policy) as trainer, pytest.raises(ConfigError, match="batch_norm"):
            trainer.predict(records())
        return
    if not send_weights:
        model.mid.norm = nn.Identity()

    with training(node, ledger, model, policy) as trainer:
        made = trainer.predict(records(50))

    assert torch.allclose(made, model(records(50)), atol=2e-4)


def test_without_the_weights_at_home_results_are_checked_by_probes_and_biases_come_down(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        encrypted_inference, "check_probes", lambda _, drawn, **__: asked.append(len(drawn)), raising=True
    )
    model = net(deep())
    policy = Policy(activations=Clear(), inference=CkksInference(send_weights=False))

    with training(node, ledger, model, policy) as trainer:
        made = trainer.predict(records())

    assert asked == [8, 8, 8]
    assert torch.allclose(made, model(records()), atol=2e-4)


def test_batches_of_any_size_come_back_in_order_and_share_ciphertexts(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = _recorded(monkeypatch)
    model, x = net(deep()), records(5000)
    sizes = [1, 64, 500, 3000, 900, 500, 35]

    with training(node, ledger, model) as trainer:
        made = list(trainer.predictions([(part,) for part in torch.split(x, sizes)]))

    assert [len(part) for part in made] == sizes
    assert torch.allclose(torch.cat(made), model(x), atol=2e-4)
    assert len(queries) == 3 * 4  # of three layers each: 565, 1500, 1500, and 1435 rows
    assert [q.layer for q in queries[:4]] == [0, 0, 0, 0]  # all four under way before the first comes back


def test_rows_of_any_length_are_scaled_and_come_back_at_their_own(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    model = net(nn.Linear(HIDDEN, CLASSES))
    model.mid = nn.Linear(FEATURES, CLASSES)
    x = records(6) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 0.0])[:, None]
    cut = cloister.Cut(front=Wide(), middle=model.mid, head=nn.Identity(), example=x)

    with cloister.Trainer(
        cut, node=node.address, identity=node.owner, policy=ENCRYPTED, optimizer=cloister.SGD(lr=0.1), ledger=ledger
    ) as trainer:
        made = trainer.predict(x)

    products = made - model.mid.bias
    wanted = (x @ model.mid.weight.T).detach()
    assert ((products - wanted).abs() <= 1e-4 * x.norm(dim=1, keepdim=True) + 1e-6).all()


class Wide(nn.Module):
    """A front that changes nothing, though it makes a tensor of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


def test_a_vanilla_cut_is_evaluated_under_encryption_too(node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
    model = net(deep())
    with training(node, ledger, model, head=None) as trainer:
        made = trainer.predict(records())

    assert torch.allclose(made, model(records()), atol=2e-4)


def loader(count: int = RECORDS) -> DataLoader[Any]:
    x = records(count)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), 64)


def test_evaluation_is_that_of_the_clear_and_follows_training(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    clear = Policy(
        activations=Clear(), labels=Clear(), gradients=Clear(), front=Clear(), head=Clear(), inference=CkksInference()
    )
    with training(node, ledger, net(deep()).train(), clear) as trainer:
        before = trainer.evaluate(loader())
        for _ in range(2):
            trainer.fit(loader(), 2)
            found, here = trainer.evaluate(loader()), _here(trainer)

            assert found.loss == pytest.approx(here[0], abs=1e-4)
            assert found.accuracy == pytest.approx(here[1], abs=1e-6)
        assert found.loss < before.loss - 0.05
        assert trainer.traffic.up > 0


def _here(trainer: cloister.Trainer) -> tuple[float, float]:
    model = trainer.cut.reassemble().eval()
    x, y = loader().dataset[:]
    with torch.no_grad():
        made = model(x)
    model.train()
    return float(nn.functional.cross_entropy(made, y)), float((made.argmax(1) == y).float().mean())


@pytest.mark.parametrize("send_weights", [True, False])
def test_a_run_under_encryption_evaluates_over_its_own_session_with_its_clip(
    node: cloister.LocalNode,
    ledger: cloister.Ledger,
    send_weights: bool,  # noqa: FBT001
) -> None:
    treatment = Ckks(clip=0.5, send_weights=send_weights)
    found = []
    for inference in (CkksInference(), cloister.Never()):
        policy = Policy(activations=treatment, inference=inference)
        with training(node, ledger, net(), policy) as trainer:
            trainer.fit(loader(), 1)
            found.append(trainer.evaluate(loader()))
            norms = trainer.cut.front(records()).norm(dim=1)
            assert trainer._inferring is None

    assert norms.min() > 0.5  # so that the clip is what makes the numbers
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-3)


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[node_pb2.Batch]:
    """Everything that goes up to be evaluated."""
    found: list[node_pb2.Batch] = []
    send = stream.Stream.send

    def recorded(own: Any, request: Any) -> None:
        if isinstance(request, node_pb2.InferRequest):
            found.append(request.batch)
        send(own, request)

    monkeypatch.setattr(stream.Stream, "send", recorded)
    return found


def test_T10_T18_nothing_goes_up_but_ciphertexts_and_the_ledger_stays_as_it_was(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = _recorded(monkeypatch)
    with training(node, ledger, net(deep())) as trainer:
        trainer.evaluate(loader())
        sent = trainer.guard.sent

    assert {q.layer for q in queries} == {0, 1, 2}
    for query in queries:
        assert not query.tensors
        counts = torch.bincount(torch.frombuffer(bytearray(query.ciphertexts.words), dtype=torch.uint8), minlength=256)
        assert float(counts.float().std() / counts.float().mean()) < 0.2  # uniform, as nothing in the clear is
    assert sent["inference"] == sum(len(q.ciphertexts.words) + len(q.ciphertexts.seeds) for q in queries)
    assert set(sent) == {"inference", "weights"}
    assert not ledger.entries()
    assert len({q.ciphertexts.seeds[:64] for q in queries}) == len(queries)


def test_the_guard_lets_ciphertexts_of_evaluated_records_go_where_the_policy_says_so() -> None:
    guard = cloister.Guard(Policy(activations=Clear()), None)

    with pytest.raises(ReleaseRefusedError, match='inference = "ckks"'):
        guard.encrypted_inference(None)  # type: ignore[arg-type]  # refused before it is looked at
    with pytest.raises(ReleaseRefusedError, match="no activations in the clear"):
        cloister.Guard(ENCRYPTED, None).inference([torch.zeros(1)])


def test_an_epsilon_may_be_claimed_beside_encrypted_inference() -> None:
    policy = Policy(activations=Ckks(clip=1.0, noise=1.0), inference=CkksInference(), epsilon=3.0)

    assert Policy.from_json(policy.to_json()) == policy
    assert Policy.from_json({"activations": "clear", "inference": "ckks"}).inference == CkksInference()
    with pytest.raises(ConfigError, match="check_rows"):
        CkksInference(check_rows=1.5)  # type: ignore[arg-type]  # what a job file may hold
    with pytest.raises(ConfigError, match="send_weights"):
        Policy.from_json({"activations": "clear", "inference": {"treatment": "ckks", "send_weights": 1}})


def _forged(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """A node that changes its answers to what is evaluated."""
    receive = stream.Stream.receive

    def forged(own: Any) -> Any:
        request, response = receive(own)
        if isinstance(response, node_pb2.InferResponse):
            change(request.batch, response)
        return request, response

    monkeypatch.setattr(stream.Stream, "receive", forged)


def _of_the_key(_: Any, response: Any) -> None:
    """(0, K) decrypts to K times the key."""
    words = torch.frombuffer(bytearray(response.ciphertexts.words), dtype=torch.uint8)
    half = len(words) // 2
    words[:half] = 0
    words[half:] = torch.tensor([1, 0, 0, 0, 0, 0, 0], dtype=torch.uint8).repeat(half // 7 + 1)[:half]
    response.ciphertexts.words = words.numpy().tobytes()


class _Earlier:
    """Answers with what was answered before: to another batch, or for another layer."""

    def __init__(self, *, layer: int | None = None) -> None:
        self.kept: list[bytes] = []
        self.layer = layer

    def __call__(self, batch: node_pb2.Batch, response: Any) -> None:
        self.kept.append(response.ciphertexts.SerializeToString())
        if self.layer is None or batch.layer == self.layer:
            response.ciphertexts.ParseFromString(self.kept[0])


def _transparent(_: Any, response: Any) -> None:
    words = response.ciphertexts.words
    response.ciphertexts.words = words[: len(words) // 2] + bytes(len(words) // 2)


def _shifted(_: Any, response: Any) -> None:
    response.ciphertexts.words = response.ciphertexts.words[1:] + response.ciphertexts.words[:1]


@pytest.mark.parametrize(
    "forgery",
    [
        (_of_the_key, CloisterError, None),
        (_Earlier(), TamperingSuspectedError, "what it sent is in"),
        (_Earlier(layer=1), TamperingSuspectedError, None),
        (_transparent, MessageRejectedError, "transparent"),
        (_shifted, CloisterError, None),
        (lambda _, r: r.ClearField("ciphertexts"), MessageRejectedError, "no ciphertexts"),
        (lambda _, r: r.tensors.add(), MessageRejectedError, "told tensors"),
        (lambda _, r: setattr(r.ciphertexts, "count", 2**31), MessageRejectedError, "expected"),
        (lambda _, r: setattr(r.ciphertexts, "words", b""), MessageRejectedError, "bytes of words"),
        (lambda _, r: setattr(r, "index", 7), MessageRejectedError, "another batch"),
    ],
)
def test_T17_T18_forged_answers_end_the_prediction(
    node: cloister.LocalNode,
    ledger: cloister.Ledger,
    monkeypatch: pytest.MonkeyPatch,
    forgery: tuple[Any, type[CloisterError], str | None],
) -> None:
    change, error, why = forgery
    _forged(monkeypatch, change)
    middle = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))
    batches = [(part,) for part in torch.split(records(4000), 2000)]

    with training(node, ledger, net(middle)) as trainer, pytest.raises(error, match=why) as told:
        list(trainer.predictions(batches))

    assert isinstance(told.value, (MessageRejectedError, TamperingSuspectedError))


def test_T17_answers_that_two_batches_get_for_each_other_are_found_out(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    receive = stream.Stream.receive

    def swapped(own: Any) -> Any:
        if len(own) == 2 and not held:
            one, other = receive(own), receive(own)
            mine = one[1].ciphertexts.SerializeToString()
            one[1].ciphertexts.CopyFrom(other[1].ciphertexts)
            other[1].ciphertexts.ParseFromString(mine)
            held.append(other)
            own._unanswered.append(other[0])  # as if it were still to come
            return one
        return receive(own)

    monkeypatch.setattr(stream.Stream, "receive", swapped)
    batches = [(part,) for part in torch.split(records(4000), 2000)]

    with training(node, ledger, net()) as trainer, pytest.raises(TamperingSuspectedError):
        list(trainer.predictions(batches))
    assert held


def test_T17_T18_what_was_sent_and_answered_is_kept_and_no_number_is_told(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forged(monkeypatch, _Earlier())

    with training(node, ledger, net(deep())) as trainer, pytest.raises(TamperingSuspectedError) as told:
        list(trainer.predictions([(part,) for part in torch.split(records(4000), 2000)]))

    said, _, kept = str(told.value).rpartition("; what it sent is in ")
    assert encryption_pb2.Ciphertexts.FromString(Path(kept).read_bytes()).count == 24
    assert (Path(kept).parent / "tampering-inference-sent.bin").stat().st_size > 16 * 13_000
    assert not any(char.isdigit() for char in said)


def test_T17_one_row_of_two_thousand_that_is_another_is_found_out(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = unpack_rows
    changed: list[float] = []

    def forged(slots: Any, block: int) -> Any:
        rows = unpack(slots, block)
        changed.append(1.0)
        rows[7, 1] += 1.0  # of rows of norm 100 and more
        return rows

    monkeypatch.setattr(encrypted_inference, "unpack_rows", forged)
    monkeypatch.setattr("secrets.randbelow", lambda _: 0)  # the rows that are drawn are others

    with training(node, ledger, net()) as trainer, pytest.raises(TamperingSuspectedError, match="for some rows"):
        trainer.predict(records(2000))
    assert changed


def test_T17_without_the_checks_another_answer_would_pass(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forged(monkeypatch, _Earlier())
    monkeypatch.setattr(EncryptedInference, "_check", lambda *_: None)

    with training(node, ledger, net()) as trainer:
        made = list(trainer.predictions([(part,) for part in torch.split(records(4000), 2000)]))

    assert [len(part) for part in made] == [2000, 2000]


def test_T06_activations_that_are_not_finite_are_refused(node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
    x = records(4)
    x[2, 0] = float("nan")

    with training(node, ledger, net()) as trainer, pytest.raises(NonFiniteError):
        trainer.predict(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.unflatten(1, (4, 4))
        made: torch.Tensor = (
            torch.softmax(tokens @ self.keys(tokens).transpose(1, 2), -1) @ self.values(tokens)
        ).flatten(1)
        return made


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(x - x.mean(0, keepdim=True))
        return made


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, 2 * self.weight)


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (nn.ReLU(), "has a linear or convolution layer"),
        (Attention(), "aten::matmul.default is neither .* move the cut"),
        (Centred(), "several rows of a batch together"),
        (nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Doubled()), "anew"),
    ],
)
def test_middles_that_do_not_fit_are_refused_with_what_to_do(
    node: cloister.LocalNode, ledger: cloister.Ledger, middle: nn.Module, why: str
) -> None:
    with training(node, ledger, net(middle)) as trainer, pytest.raises(ConfigError, match=why):
        trainer.predict(records(4))


def test_weights_with_which_a_result_could_wrap_are_refused_on_both_sides(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    with torch.no_grad():
        next(model.mid.parameters()).mul_(1e5)
    with training(node, ledger, model) as trainer, pytest.raises(ConfigError, match="could make ciphertexts wrap"):
        trainer.predict(records(4))

    scheme = inference_scheme(
        cloister.cut(net(), front="front", head="head", example=torch.randn(4, FEATURES)), CkksInference()
    )
    monkeypatch.setattr("client_side.trainer.inference_scheme", lambda *_: scheme)
    with training(node, ledger, model) as trainer, pytest.raises(LimitExceededError, match="wrap"):
        trainer.predict(records(4))


def test_T02_a_program_of_layers_too_large_or_too_many_is_refused_before_they_are_made() -> None:
    def layers(middle: nn.Module, *shape: int) -> Any:
        return affine_layers(cloister.Cut(front=Wide(), middle=middle, example=torch.randn(2, *shape)).program)

    wide = nn.Conv1d(1, 1, 3, padding=1)
    with pytest.raises(LimitExceededError, match="20000 by 20000"):
        layers(wide, 1, 20_000)
    with pytest.raises(LimitExceededError, match=f"more than {MAX_MATRIX} weights"):
        layers(nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1) for _ in range(3))), 1, 5000)
    with pytest.raises(LimitExceededError, match="257 layers"):
        layers(nn.Sequential(*(nn.Linear(2, 2) for _ in range(257))), 2)
    assert [(layer.features, layer.outputs, layer.rows_each) for layer in layers(Residual(), 16)] == [
        (4, 9, 4),
        (9, 4, 4),
    ]


def test_what_lies_between_two_layers_is_light(node: cloister.LocalNode) -> None:
    del node
    cut = cloister.Cut(front=Wide(), middle=Attention(), example=torch.randn(2, 16))

    with pytest.raises(SpecRejectedError, match="matmul"):
        check_light(cut.program, weights_here=True)
