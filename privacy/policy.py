"""What may leave, as data: one treatment for each kind of release.

Kinds: ``activations`` (smashed data of the training records), ``labels``, ``gradients`` (at the middle's outputs, in
the U-shape), ``inference`` (activations when evaluating or predicting; encrypted, they tell a node nothing). ``front``
and ``head`` say how these parts learn, because all that they learn shows in whatever they send later.

A finite ε is claimed only where :func:`holes` finds nothing: each entry there is a way around the treatments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from privacy.accounting import Relation
from wire.errors import ConfigError

__all__ = [
    "CLEAR",
    "Activations",
    "Aggregate",
    "Ckks",
    "CkksInference",
    "CkksSquare",
    "Clear",
    "DpSgd",
    "Frozen",
    "GaussianRows",
    "Gradients",
    "Included",
    "Inference",
    "Labels",
    "Moments",
    "Never",
    "Part",
    "Policy",
    "RandomizedLabels",
    "Rows",
    "Table",
    "holes",
    "labels_told",
    "treatment_name",
]


@dataclass(frozen=True, slots=True)
class Clear:
    """As it is: ε is infinite."""


@dataclass(frozen=True, slots=True)
class Never:
    """It does not leave at all."""


@dataclass(frozen=True, slots=True)
class Included:
    """It leaves with the activations' release, and is accounted there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Each record's activation, clipped, plus noise: a local guarantee.

    Attributes:
        clip: L2 norm of one record's activation at most.
        noise: standard deviation, in units of ``clip``; ``None`` takes what the budget leaves.
        once: released once and kept by the node; otherwise noised anew in every epoch.
    """

    clip: float
    noise: float | None = None
    once: bool = True

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        _positive("rows", clip=self.clip, noise=self.noise)
        if type(self.once) is not bool:
            raise ConfigError(f"rows: once = {self.once!r}; true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """Sums over secret Poisson samples of clipped activations, one for each class, plus noise, as training rows.

    Attributes:
        clip: as for :class:`Rows`.
        rate: with which each record joins each sample.
        releases: samples drawn; each gives one row a class.
        noise: standard deviation, in units of ``clip``; ``None`` takes what the budget leaves.
    """

    clip: float
    rate: float
    releases: int
    noise: float | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        _positive("aggregate", clip=self.clip, rate=self.rate, releases=self.releases, noise=self.noise)
        if self.rate > 1 or type(self.releases) is not int:
            raise ConfigError(f"aggregate: rate = {self.rate}, releases = {self.releases}; a probability, and a number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Class counts, class means and second moments of unit-norm activations, released once; rows are sampled from them.

    Attributes:
        noise: standard deviation on the vector of :func:`privacy.mechanisms.noisy_moments`; ``None`` takes what the
            budget leaves.
        count_weight: of the class counts in that vector.
        second_weight: of the second moments.
        per_class: a covariance for each class, otherwise one that all classes share.
        rows: synthetic rows that are sampled; as many as there are records, unless said otherwise.
    """

    noise: float | None = None
    count_weight: float = 0.7
    second_weight: float = 0.7
    per_class: bool = False
    rows: int | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        _positive(
            "moments",
            noise=self.noise,
            count_weight=self.count_weight,
            second_weight=self.second_weight,
            rows=self.rows,
        )
        if (self.rows is not None and type(self.rows) is not int) or type(self.per_class) is not bool:
            raise ConfigError(f"moments: rows = {self.rows!r}, per_class = {self.per_class!r}; a number; true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ckks:
    """Each record's activation, clipped and encrypted; all that learns moves by joint DP-SGD over secret samples.

    The middle is one linear or convolution layer, which a node evaluates on ciphertexts; loss, labels and bias stay
    here. What leaves in the clear is the gradient of the layer's parameters alone: each record's, over front, layer and
    head together, clipped to ``gradient_clip``; their sum noised.

    Attributes:
        clip: L2 norm of one record's activation at most; longer ones are scaled down, in training and for good.
        gradient_clip: L2 norm of one record's gradient over all parameters.
        noise: standard deviation on the sum, in units of ``gradient_clip``; ``None`` takes what the budget leaves.
            Without a budget it clips and noises nothing: the layer's gradient tells activations and labels.
        send_weights: whether the node sends the layer's weights with each step, which costs less than having it compute
            the front's gradients under encryption.
        check_rows: of each batch so many rows, drawn at random, are computed here as well and compared.
    """

    clip: float
    gradient_clip: float = 1.0
    noise: float | None = None
    send_weights: bool = True
    check_rows: int = 32

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        _positive(
            "ckks", clip=self.clip, gradient_clip=self.gradient_clip, noise=self.noise, check_rows=self.check_rows
        )
        _check_exchange(self.send_weights, self.check_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class CkksInference:
    """Encrypted before it leaves, in evaluation and prediction: a node sees ciphertexts, their number, and timing.

    The node evaluates the middle's linear and convolution layers; what lies between two of them is computed here, in
    the clear, and encrypted anew. What was decrypted stays here. So nothing is released, and nothing accounted.

    Attributes:
        send_weights: whether the owner checks results by weights that it has; otherwise by secret combinations of rows,
            and the node sends biases alone.
        check_rows: of each batch so many rows, drawn at random, are computed here as well and compared.
    """

    send_weights: bool = True
    check_rows: int = 32

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        _positive("ckks", check_rows=self.check_rows)
        _check_exchange(self.send_weights, self.check_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class CkksSquare:
    """As :class:`CkksInference`, of a middle of linear, square, linear: the node evaluates all of it in one go.

    Attributes:
        row_norm: L2 norm of one record's activation at most; longer ones are refused before they leave.
        tolerance: by which a result may be off at most; the ring is the smallest that keeps it.
    """

    row_norm: float
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        _positive("ckks_square", row_norm=self.row_norm, tolerance=self.tolerance)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomizedLabels:
    """Labels through k-ary randomized response, once."""

    epsilon: float

    def __post_init__(self) -> None:
        """Raises: ConfigError where ε is none."""
        _positive("randomized_response", epsilon=self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianRows:
    """Each record's output gradient, clipped, plus noise, anew in every epoch.

    Attributes:
        clip: L2 norm of one record's gradient at most.
        noise: standard deviation, in units of ``clip``.
    """

    clip: float
    noise: float

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        _positive("gaussian", clip=self.clip, noise=self.noise)


@dataclass(frozen=True, slots=True)
class Frozen:
    """This part does not learn, and what it knows does not come from this data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DpSgd:
    """Per-record gradients of this part are clipped, summed and noised (Abadi et al. 2016).

    Attributes:
        clip: L2 norm of one record's gradient at most.
        noise: standard deviation, in units of ``clip``.
    """

    clip: float
    noise: float

    def __post_init__(self) -> None:
        """Raises: ConfigError where a number makes no sense."""
        _positive("dp_sgd", clip=self.clip, noise=self.noise)


Activations: TypeAlias = Clear | Rows | Aggregate | Moments | Ckks
Labels: TypeAlias = Clear | Never | Included | RandomizedLabels
Gradients: TypeAlias = Clear | Included | GaussianRows
Part: TypeAlias = Clear | Frozen | DpSgd
Inference: TypeAlias = Clear | Never | CkksInference | CkksSquare
#: Treatments that release a table of rows once, from which any number of epochs are trained.
Table: TypeAlias = Rows | Aggregate | Moments

# Of all numbers but δ: what lies beyond means nothing, and overflows somewhere.
_LEAST: Final = 1e-9
_MOST: Final = 1e9
_SWITCHES: Final = frozenset({"once", "per_class", "send_weights"})

_NAMES: Final[dict[str, dict[str, type[Any]]]] = {
    "activations": {"clear": Clear, "rows": Rows, "aggregate": Aggregate, "moments": Moments, "ckks": Ckks},
    "labels": {"clear": Clear, "never": Never, "included": Included, "randomized_response": RandomizedLabels},
    "gradients": {"clear": Clear, "included": Included, "gaussian": GaussianRows},
    "front": {"clear": Clear, "frozen": Frozen, "dp_sgd": DpSgd},
    "head": {"clear": Clear, "frozen": Frozen, "dp_sgd": DpSgd},
    "inference": {"clear": Clear, "never": Never, "ckks": CkksInference, "ckks_square": CkksSquare},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One treatment for each kind of release, and what all of them together may cost.

    Attributes:
        activations: of the training records.
        labels: that go to the node (vanilla); in the U-shape they stay. Unless said otherwise, they are released with
            activations that are summed up, and otherwise never.
        gradients: at the middle's outputs (U-shape).
        front: how it learns.
        head: how it learns (U-shape).
        inference: whether evaluating and predicting may go through the node, and how; ``Never`` does it at home.
        epsilon: what may be spent on the data set, by all runs on it together; infinite where none is claimed.
        delta: below 1/n.
        relation: which data sets count as neighbours; see :class:`~privacy.accounting.Relation`.
        unit: whose contribution is protected: ``record``, or what the unit ids mean, such as ``patient``.
        records_per_unit: of one unit at most so many take part where each record's row leaves by itself.
        classes: how many there are, which is no secret; needed where labels leave treated.
    """

    activations: Activations
    labels: Labels | None = None
    gradients: Gradients = Included()
    front: Part = Frozen()
    head: Part = Frozen()
    inference: Inference = Never()
    epsilon: float = math.inf
    delta: float = 1e-5
    relation: Relation = Relation.REPLACE_ONE
    unit: str = "record"
    records_per_unit: int = 1
    classes: int | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError where the budget makes no sense."""
        if self.labels is None:
            summed = isinstance(self.activations, Aggregate | Moments)
            object.__setattr__(self, "labels", Included() if summed else Never())
        finite = math.isfinite(self.epsilon)
        if not self.epsilon > 0 or not 0 < self.delta < 1 or (finite and not _LEAST <= self.epsilon <= _MOST):
            raise ConfigError(f"privacy: epsilon = {self.epsilon}, delta = {self.delta}: above 0; delta below 1")
        if isinstance(self.labels, Included) and not isinstance(self.activations, Aggregate | Moments):
            raise ConfigError(
                'privacy: labels = "included", and only aggregate and moments include them: take randomized_response, '
                "or never"
            )
        if not self.unit or len(self.unit) > 40:  # noqa: PLR2004 - one word
            raise ConfigError('privacy: unit is a word, such as "record" or "patient"')
        if self.records_per_unit < 1 or (self.unit == "record" and self.records_per_unit > 1):
            raise ConfigError('privacy: records_per_unit is at least 1, and 1 where unit = "record"')
        if self.classes is not None and self.classes < 2:  # noqa: PLR2004 - fewer are no classes
            raise ConfigError("privacy: classes is 2 or more")
        if self.classes is None and (
            isinstance(self.activations, Aggregate | Moments) or isinstance(self.labels, RandomizedLabels)
        ):
            raise ConfigError("privacy: say how many classes there are (classes = 10): counting them would tell")

    @property
    def table(self) -> Table | None:
        """The treatment, where it releases a table of rows once."""
        if isinstance(self.activations, Aggregate | Moments):
            return self.activations
        return self.activations if isinstance(self.activations, Rows) and self.activations.once else None

    @property
    def labels_apart(self) -> bool:
        """Whether labels are randomized once for the run, while rows leave in every epoch; if labels go to the node."""
        return isinstance(self.labels, RandomizedLabels) and self.table is None

    @property
    def claims(self) -> bool:
        """Whether a finite ε is asked for."""
        return math.isfinite(self.epsilon)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as job files hold it; the law: ``Policy.from_json(p.to_json()) == p``."""
        found: dict[str, Any] = {}
        for kind in _NAMES:
            treatment = getattr(self, kind)
            found[kind] = {"treatment": treatment_name(kind, treatment)} | dataclasses.asdict(treatment)
        found |= {"delta": self.delta, "relation": str(self.relation), "unit": self.unit}
        found |= {"records_per_unit": self.records_per_unit}
        found |= {} if self.classes is None else {"classes": self.classes}
        return found | ({"epsilon": self.epsilon} if self.claims else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Policy:
        """A policy from plain data: each treatment by name, or as a table with ``treatment`` and its numbers.

        Raises:
            ConfigError: naming the key, and what it may hold.
        """
        given: dict[str, Any] = {}
        kinds: dict[str, type[Any]] = {"unit": str, "classes": int, "records_per_unit": int}
        for key, value in values.items():
            if key in _NAMES:
                given[key] = _treatment(key, value)
            elif key == "relation":
                given[key] = _relation(value)
            elif key in {"epsilon", "delta"}:
                given[key] = _number(key, value)
            elif type(value) is kinds.get(key):
                given[key] = value
            else:
                wrong = f"= {value!r}: not a {kinds[key].__name__}" if key in kinds else "is no such key"
                raise ConfigError(f"privacy.{key} {wrong}; see docs/reference/job-file.md")
        if "activations" not in given:
            raise ConfigError(
                'privacy.activations is missing: write "moments", "aggregate" or "rows"; "clear" lets them leave as '
                "they are"
            )
        return cls(**_completed(given))


def treatment_name(kind: str, treatment: object) -> str:
    """What a treatment of that kind of release is called in policies and in the ledger."""
    return next(name for name, known in _NAMES[kind].items() if type(treatment) is known)


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    """What the other kinds are where only the activations' treatment was named."""
    activations = given["activations"]
    if isinstance(activations, Clear):
        named = {"labels", "gradients", "front", "head", "inference"}
        return dict.fromkeys(named, Clear()) | given
    return given


def holes(policy: Policy, *, vanilla: bool, front_learns: bool, head_learns: bool) -> list[str]:
    """Why no finite ε holds for the run; nothing, where one does.

    Args:
        policy: what is asked for.
        vanilla: whether the labels go to the node.
        front_learns: whether the front has parameters that train.
        head_learns: the same of the head.
    """
    found = []
    if isinstance(policy.activations, Ckks):
        return _encrypted_holes(policy, policy.activations)
    if isinstance(policy.activations, Clear):
        found.append("activations leave in the clear")
    # Rows and labels that were released together: what is computed from them tells nothing more.
    in_table = isinstance(policy.activations, Aggregate | Moments) or (
        policy.table is not None and isinstance(policy.labels, RandomizedLabels)
    )
    if front_learns and not isinstance(policy.front, DpSgd):
        found.append("the front trains on the data without dp_sgd, and all later activations tell what it learnt")
    if vanilla and isinstance(policy.labels, Clear):
        found.append("labels leave in the clear")
    if not vanilla and not in_table:
        if isinstance(policy.gradients, Clear):
            found.append("output gradients leave in the clear, and tell every label, also in the U-shape")
        elif isinstance(policy.gradients, Included):
            found.append("output gradients depend on labels that no release includes: give gradients a treatment")
        if head_learns and not isinstance(policy.head, DpSgd):
            found.append("the head trains on the labels without dp_sgd, and all later gradients tell what it learnt")
    if isinstance(policy.inference, Clear):
        found.append("evaluation and prediction send activations in the clear")
    return found


def _encrypted_holes(policy: Policy, treatment: Ckks) -> list[str]:
    found = []
    if treatment.noise is None and not policy.claims:
        found.append("the encrypted layer's gradients leave without noise: give ckks a noise, or the policy an epsilon")
    if policy.unit != "record":
        found.append('ckks draws samples of records, which says nothing of whole units: unit = "record"')
    if isinstance(policy.inference, Clear):
        found.append("evaluation and prediction send activations in the clear")
    return found


def labels_told(policy: Policy) -> str:
    """What becomes of the labels of a run whose node computes the loss (vanilla), in words."""
    if isinstance(policy.labels, Never):
        return "labels may not leave"
    if isinstance(policy.labels, RandomizedLabels):
        return "labels go to the node randomized"
    if isinstance(policy.labels, Included):
        return "synthetic rows go to the node with labels of their own"
    return "labels go to the node"


def _treatment(kind: str, value: object) -> object:
    names = _NAMES[kind]
    table = {"treatment": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or not isinstance(table.get("treatment"), str) or table["treatment"] not in names:
        raise ConfigError(f"privacy.{kind} = {value!r}: one of {', '.join(names)}, or a table with treatment = …")
    numbers = {key: item for key, item in table.items() if key != "treatment"}
    known = {field.name for field in dataclasses.fields(names[table["treatment"]])}
    if odd := numbers.keys() - known:
        raise ConfigError(f"privacy.{kind}.{min(odd)}: {table['treatment']} takes {', '.join(sorted(known)) or 'none'}")
    for key, item in numbers.items():
        if item is not None and (not isinstance(item, int | float) or (type(item) is bool and key not in _SWITCHES)):
            raise ConfigError(f"privacy.{kind}.{key} = {item!r}: a number")
    try:
        made: object = names[table["treatment"]](**numbers)
    except TypeError as error:
        name = table["treatment"]
        needed = [f.name for f in dataclasses.fields(names[name]) if f.default is dataclasses.MISSING]
        missing = [key for key in needed if key not in numbers]
        example = ", ".join(f"{key} = {numbers.get(key, '…')}" for key in needed)
        raise ConfigError(
            f"privacy.{kind}: {name} also needs {', '.join(missing)}: write {kind} = "
            f'{{ treatment = "{name}", {example} }}'
        ) from error
    return made


def _relation(value: object) -> Relation:
    try:
        return Relation(str(value))
    except ValueError as error:
        raise ConfigError(f"privacy.relation = {value!r}: {' or '.join(Relation)}") from error


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"privacy.{key} = {value!r}: a number")
    return float(value)


def _positive(treatment: str, **numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and (type(value) is bool or not _LEAST <= value <= _MOST):
            raise ConfigError(f"{treatment}: {name} = {value}; above 0, from {_LEAST:g} to {_MOST:g}")


def _check_exchange(send_weights: object, check_rows: object) -> None:
    if type(send_weights) is not bool or type(check_rows) is not int:
        raise ConfigError(
            f"ckks: send_weights = {send_weights!r}, check_rows = {check_rows!r}; true or false, and a whole number"
        )


#: Everything as it is: for nodes that are trusted, or attested.
CLEAR: Final = Policy(
    activations=Clear(), labels=Clear(), gradients=Clear(), front=Clear(), head=Clear(), inference=Clear()
)
