"""The operators that a program may name: an allow-list, looked up once and typed by ATen's own schemas.

On the list stand operators that compute tensors from tensors, whatever their arguments, and do nothing else: none reads
or writes files, none reinterprets memory (``as_strided``, ``set_``, ``resize_``) or returns it uninitialised (``empty``),
none yields a size that depends on data (``nonzero``, ``item``, ``unique``), none takes a foreign generator. An operator
off the list is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal, TypeAlias

import torch

from wire.errors import ComputeError, ProgramRejectedError

__all__ = ["GETITEM", "SET_GRAD", "SIZE_OPERATORS", "Operator", "Parameter", "ValueKind", "resolve"]

#: What a value in a program is: a tensor, a size, several tensors, or nothing.
ValueKind: TypeAlias = Literal["tensor", "size", "tensors", "nothing"]

GETITEM: Final = "cloister::getitem"
SET_GRAD: Final = "cloister::set_grad_enabled"

_MAX_NAME: Final = 80  # the longest ATen name in use, doubled

_PURE: Final = frozenset(
    """
    abs acos acosh add addcdiv addcmul addmm adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d alias all amax amin any arange argmax argmin asin asinh atan atan2 atanh
    avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bitwise_xor bmm
    broadcast_tensors cat ceil celu channel_shuffle chunk clamp clamp_max clamp_min clone column_stack concat
    concatenate constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution cos cosh cross cumprod cumsum deg2rad detach diag_embed diagonal diff div divide dot dropout einsum
    elu embedding eq erf erfc exp exp2 expand expand_as expm1 feature_dropout alpha_dropout fft_irfft
    fill flatten flip floor floor_divide fmod frac full full_like gather ge gelu glu greater greater_equal group_norm
    gru gt hardshrink hardsigmoid hardswish hardtanh hstack huber_loss hypot index_add index_select
    instance_norm isfinite isinf isnan l1_loss layer_norm le leaky_relu lerp less less_equal lift_fresh_copy linear
    linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logical_and logical_not logical_or
    logical_xor logit logsumexp lstm lt masked_fill matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
    maximum mean median meshgrid min minimum mish mm movedim moveaxis mse_loss mul multiply mv
    native_batch_norm native_dropout native_group_norm native_layer_norm narrow ne neg negative nan_to_num new_full
    new_ones new_zeros norm not_equal numel one_hot ones ones_like outer pad permute pixel_shuffle
    pixel_unshuffle polar pow prelu prod rad2deg real reciprocal reflection_pad1d reflection_pad2d relu relu6 remainder
    repeat repeat_interleave replication_pad1d replication_pad2d reshape reshape_as rms_norm rnn_relu rnn_tanh roll
    rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add select selu sigmoid
    sign silu sin sinc sinh slice smooth_l1_loss soft_margin_loss softmax softplus softshrink split split_with_sizes
    sqrt square squeeze stack std sub subtract sum swapaxes swapdims sym_size t take_along_dim tan tanh tanh_backward
    tensor_split threshold tile to topk transpose tril triu true_divide trunc type_as unbind unflatten unfold
    unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_trilinear3d upsample_nearest3d var var_mean vstack view view_as where xlogy zeros
    zeros_like _unsafe_view _to_copy _softmax _log_softmax __and__ __or__ __xor__
    """.split(),
)

# The in-place forms that models really use. They write to values of the session alone: inputs are copies, and a
# parameter that requires a gradient refuses them by itself.
_IN_PLACE: Final = frozenset(
    """
    add_ sub_ mul_ div_ relu_ relu6_ leaky_relu_ elu_ celu_ selu_ hardtanh_ hardswish_ hardsigmoid_ silu_ mish_ clamp_
    clamp_min_ clamp_max_ dropout_ feature_dropout_ alpha_dropout_ masked_fill_ sigmoid_ tanh_ exp_ neg_ pow_ copy_
    fill_ zero_ threshold_ rrelu_ square_ sqrt_ abs_ lerp_ addcmul_ unsqueeze_ squeeze_ detach_ scatter_ index_add_
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
SIZE_OPERATORS: Final[dict[str, str]] = {
    name.removeprefix("cloister::"): name for name in _SIZE_FUNCTIONS
}

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
        return Operator(name, torch._C._set_grad_enabled, (mode,), "nothing", False, False)  # noqa: FBT003, SLF001
    if name == GETITEM:
        items = Parameter("items", "tensors", required=True, keyword_only=False)
        index = Parameter("index", "int", required=True, keyword_only=False)
        return Operator(name, operator.getitem, (items, index), "tensor", False, False)  # noqa: FBT003
    if name in _SIZE_FUNCTIONS:
        count = 1 if name == "cloister::neg" else 2
        sizes = tuple(Parameter(f"size{i}", "SymInt", required=True, keyword_only=False) for i in range(count))
        return Operator(name, _SIZE_FUNCTIONS[name], sizes, "size", False, False)  # noqa: FBT003
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if len(name) > _MAX_NAME or namespace != "aten" or not overload or base not in _PURE | _IN_PLACE:
        raise ProgramRejectedError(f"the operator {name[:_MAX_NAME]!r} is not on the allow-list")
    packet = getattr(torch.ops.aten, base, None)
    if packet is None or overload not in packet.overloads():
        raise ProgramRejectedError(f"the operator {name!r} has no such overload in torch {torch.__version__}")
    return _from_schema(name, getattr(packet, overload))


def _from_schema(name: str, function: torch._ops.OpOverload) -> Operator:
    schema = function._schema  # noqa: SLF001 -- the only way to an operator's types
    parameters = tuple(
        Parameter(a.name, str(a.real_type), required=not a.has_default_value(), keyword_only=a.kwarg_only)
        for a in schema.arguments
    )
    for parameter in parameters:
        if parameter.type not in _FILLABLE or parameter.name == "out":
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
    return Operator(
        name,
        function,
        parameters,
        returns,
        random=torch.Tag.nondeterministic_seeded in function.tags,
        in_place=schema.is_mutable,
    )
