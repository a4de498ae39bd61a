"""The operators that a program may name: an allow-list, looked up once and typed by ATen's own schemas.

On the list stand operators that compute tensors from tensors, whatever their arguments, and do nothing else: none
reads or writes files, none reinterprets memory (``as_strided``, ``set_``, ``resize_``, ``view.dtype``) or returns it
uninitialised (``empty``), none yields a size that depends on data (``nonzero``, ``item``, ``unique``), none takes a
foreign generator. An operator off the list is refused by name. Those that do not check their arguments well enough
stand behind :mod:`wire.guards`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal, TypeAlias

import torch

from wire.errors import ComputeError, ProgramRejectedError
from wire.guards import guarded

__all__ = ["GETITEM", "SET_GRAD", "SIZE_OPERATORS", "Operator", "Parameter", "ValueKind", "resolve"]

#: What a value in a program is: a tensor, a size, several tensors, or nothing.
ValueKind: TypeAlias = Literal["tensor", "size", "tensors", "nothing"]

GETITEM: Final = "cloister::getitem"
SET_GRAD: Final = "cloister::set_grad_enabled"

_MAX_NAME: Final = 80  # the longest ATen name in use, doubled

#: A name without an overload means its ``default`` one. Listed one by one, since overloads differ in what they do:
#: some write to an ``out``, reinterpret memory, or read the data to know a size.
_PURE: Final = frozenset(
    """
    __and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Scalar __xor__.Tensor _to_copy _unsafe_view abs
    acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    add.Scalar add.Tensor addcdiv addcmul addmm alias all all.dim all.dims alpha_dropout amax amin any any.dim any.dims
    arange arange.start arange.start_step argmax argmin asin asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d
    baddbmm batch_norm bitwise_and.Scalar bitwise_and.Scalar_Tensor bitwise_and.Tensor bitwise_not bitwise_or.Scalar
    bitwise_or.Scalar_Tensor bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Scalar_Tensor bitwise_xor.Tensor bmm
    broadcast_tensors cat ceil celu channel_shuffle chunk clamp clamp.Tensor clamp_max clamp_max.Tensor clamp_min
    clamp_min.Tensor clone column_stack concat concatenate constant_pad_nd contiguous conv1d conv1d.padding conv2d
    conv2d.padding conv3d conv3d.padding conv_transpose1d conv_transpose2d.input conv_transpose3d.input cos cosh cross
    cumprod cumsum deg2rad detach diag_embed diagonal diff div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode
    divide.Scalar divide.Scalar_mode divide.Tensor divide.Tensor_mode dot dropout einsum elu embedding eq.Scalar
    eq.Tensor erf erfc exp exp2 expand expand_as expm1 feature_dropout fill.Scalar fill.Tensor flatten.using_ints flip
    floor floor_divide floor_divide.Scalar fmod.Scalar fmod.Tensor frac full full_like gather ge.Scalar ge.Tensor gelu
    glu greater.Scalar greater.Tensor greater_equal.Scalar greater_equal.Tensor group_norm gru.input gt.Scalar
    gt.Tensor hardshrink hardsigmoid hardswish hardtanh hstack huber_loss hypot index.Tensor index_add index_select
    instance_norm isfinite isinf isnan l1_loss layer_norm le.Scalar le.Tensor leaky_relu lerp.Scalar lerp.Tensor
    less.Scalar less.Tensor less_equal.Scalar less_equal.Tensor lift_fresh_copy linalg_vector_norm linear linspace
    linspace.Scalar_Tensor linspace.Tensor_Scalar linspace.Tensor_Tensor log log10 log1p log2 log_sigmoid
    log_softmax.int logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit logsumexp lstm.input
    lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor matmul max max.dim max.other max_pool1d max_pool2d
    max_pool2d_with_indices max_pool3d maximum mean mean.dim median median.dim meshgrid meshgrid.indexing min min.dim
    min.other minimum mish mm moveaxis.int moveaxis.intlist movedim.int movedim.intlist mse_loss mul.Scalar mul.Tensor
    multiply.Scalar multiply.Tensor mv nan_to_num narrow ne.Scalar ne.Tensor neg negative new_full new_ones new_zeros
    norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype norm.ScalarOpt_dtype not_equal.Scalar not_equal.Tensor
    numel one_hot ones ones_like outer pad permute pixel_shuffle pixel_unshuffle pow.Scalar pow.Tensor_Scalar
    pow.Tensor_Tensor prelu prod prod.dim_int rad2deg reciprocal reflection_pad1d reflection_pad2d relu relu6
    remainder.Scalar remainder.Scalar_Tensor remainder.Tensor repeat repeat_interleave.self_int replication_pad1d
    replication_pad2d reshape reshape_as rms_norm rnn_relu.input rnn_tanh.input roll rot90 round round.decimals rrelu
    rsqrt rsub.Scalar rsub.Tensor scalar_tensor scaled_dot_product_attention scatter.reduce scatter.src scatter.value
    scatter.value_reduce scatter_add select.int selu sigmoid sign silu sin sinc sinh slice.Tensor smooth_l1_loss
    soft_margin_loss softmax.int softplus softshrink split.Tensor split.sizes split_with_sizes sqrt square squeeze
    squeeze.dim squeeze.dims stack std std.correction std.dim sub.Scalar sub.Tensor subtract.Scalar subtract.Tensor sum
    sum.dim_IntList swapaxes swapdims sym_size.int t take_along_dim tan tanh tensor_split.indices tensor_split.sections
    threshold tile to.device to.dtype to.dtype_layout to.other topk transpose.int tril triu true_divide.Scalar
    true_divide.Tensor trunc type_as unbind.int unflatten.int unfold unsafe_chunk unsafe_split.Tensor unsqueeze
    upsample_bicubic2d upsample_bicubic2d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_linear1d
    upsample_linear1d.vec upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec
    upsample_nearest3d upsample_nearest3d.vec upsample_trilinear3d upsample_trilinear3d.vec var var.correction var.dim
    var_mean var_mean.correction var_mean.dim view view_as vstack where.Scalar where.ScalarOther where.ScalarSelf
    where.self xlogy.Scalar_Other xlogy.Scalar_Self xlogy.Tensor zeros zeros_like
    """.split(),
)

# The in-place forms that models really use. They write to values of the session alone: inputs are copies, and a
# parameter that requires a gradient refuses them by itself. None changes a tensor's shape (``unsqueeze_``): what a run
# over the session's own state takes was bounded for the shapes that the program states. ``detach_`` ends each constant
# that a model makes on the spot.
_IN_PLACE: Final = frozenset(
    """
    abs_ add_.Scalar add_.Tensor addcmul_ alpha_dropout_ celu_ clamp_ clamp_.Tensor clamp_max_ clamp_max_.Tensor
    clamp_min_ clamp_min_.Tensor copy_ detach_ div_.Scalar div_.Scalar_mode div_.Tensor div_.Tensor_mode dropout_
    elu_ exp_ feature_dropout_ fill_.Scalar fill_.Tensor hardsigmoid_ hardswish_ hardtanh_ index_add_ leaky_relu_
    lerp_.Scalar lerp_.Tensor masked_fill_.Scalar masked_fill_.Tensor mish_ mul_.Scalar mul_.Tensor neg_ pow_.Scalar
    pow_.Tensor relu6_ relu_ rrelu_ scatter_.reduce scatter_.src scatter_.value scatter_.value_reduce selu_ sigmoid_
    silu_ sqrt_ square_ sub_.Scalar sub_.Tensor tanh_ threshold_ zero_
    """.split(),
)

_MAX_SIZE: Final = 2**53  # no size is larger; repeated squaring of integers without a bound is a bomb


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*sizes: Any) -> Any:
        result = function(*sizes)
        if isinstance(result, int) and abs(result) > _MAX_SIZE:
            raise ComputeError("a size beyond 2**53")
        return result

    return compute


_SIZE_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "cloister::add": _bounded(operator.add),
    "cloister::sub": _bounded(operator.sub),
    "cloister::mul": _bounded(operator.mul),
    "cloister::floordiv": _bounded(operator.floordiv),
    "cloister::mod": _bounded(operator.mod),
    "cloister::neg": _bounded(operator.neg),
}
#: Python's names of what the size operators do, for whoever captures a graph.
SIZE_OPERATORS: Final[dict[str, str]] = {name.removeprefix("cloister::"): name for name in _SIZE_FUNCTIONS}

#: Argument types of ATen schemas that a program can fill, by the schema's own spelling.
_FILLABLE: Final = frozenset(
    """
    Tensor Optional[Tensor] List[Tensor] List[Optional[Tensor]] int SymInt Optional[int] Optional[SymInt] List[int]
    List[SymInt] Optional[List[int]] Optional[List[SymInt]] number Optional[number] float Optional[float] List[float]
    Optional[List[float]] bool Optional[bool] List[bool] str Optional[str] ScalarType Optional[ScalarType] Layout
    Optional[Layout] Device Optional[Device] MemoryFormat Optional[MemoryFormat] Optional[Generator]
    """.split(),
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A formal parameter of an operator, in the schema's spelling of its type."""

    name: str
    type: str
    required: bool
    keyword_only: bool


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator off the allow-list, ready to be called."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    returns: ValueKind
    #: Draws from torch's default generator, unless told not to train.
    random: bool
    in_place: bool


@cache
def resolve(name: str) -> Operator:
    """The operator called ``name``, such as ``aten::conv2d.default`` or ``cloister::floordiv``.

    Raises:
        ProgramRejectedError: it is not on the list, or has no such overload.
    """
    if name == SET_GRAD:
        mode = Parameter("enabled", "bool", required=True, keyword_only=False)
        return Operator(name, torch._C._set_grad_enabled, (mode,), "nothing", False, False)  # noqa: SLF001
    if name == GETITEM:
        items = Parameter("items", "tensors", required=True, keyword_only=False)
        index = Parameter("index", "int", required=True, keyword_only=False)
        return Operator(name, operator.getitem, (items, index), "tensor", False, False)
    if name in _SIZE_FUNCTIONS:
        count = 1 if name == "cloister::neg" else 2
        sizes = tuple(Parameter(f"size{i}", "SymInt", required=True, keyword_only=False) for i in range(count))
        return Operator(name, _SIZE_FUNCTIONS[name], sizes, "size", False, False)
    rest = name.removeprefix("aten::")
    word = rest.removesuffix(".default")
    base, _, overload = rest.partition(".")
    if len(name) > _MAX_NAME or rest == name or not overload or word not in _PURE | _IN_PLACE:
        raise ProgramRejectedError(f"the operator {name[:_MAX_NAME]!r} is not on the allow-list")
    function = getattr(getattr(torch.ops.aten, base, None), overload, None)
    if not isinstance(function, torch._ops.OpOverload):  # noqa: SLF001 -- the type has no public name
        raise ProgramRejectedError(f"torch {torch.__version__} has no operator {name!r}")
    return _from_schema(name, word, function)


def _from_schema(name: str, word: str, function: torch._ops.OpOverload) -> Operator:
    schema = function._schema  # noqa: SLF001 -- the only way to an operator's types
    parameters = tuple(
        Parameter(a.name, str(a.real_type), required=not a.has_default_value(), keyword_only=a.kwarg_only)
        for a in schema.arguments
    )
    for parameter in parameters:
        if parameter.type not in _FILLABLE:
            raise ProgramRejectedError(f"the operator {name!r} takes {parameter.type}, which a program cannot hold")
    returned = [str(r.real_type) for r in schema.returns]
    returns: ValueKind
    if returned == ["Tensor"]:
        returns = "tensor"
    elif returned in (["int"], ["SymInt"]):
        returns = "size"
    elif returned == ["List[Tensor]"] or (len(returned) > 1 and set(returned) == {"Tensor"}):
        returns = "tensors"
    else:
        raise ProgramRejectedError(f"the operator {name!r} returns {returned}, which a program cannot hold")
    if schema.is_mutable != (word in _IN_PLACE):
        raise ProgramRejectedError(f"the operator {name!r} writes to its arguments in torch {torch.__version__}")
    return Operator(
        name,
        guarded(word, function),
        parameters,
        returns,
        random=torch.Tag.nondeterministic_seeded in function.tags,
        in_place=schema.is_mutable,
    )
