"""Argument checks. Each raises an error that names the argument, what was expected and what came.

A wrong type or dtype is a TypeError, everything else a ValueError. All look at metadata only, never
at device data.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from hybrid_mxfp8.core.formats import BLOCK_SIZE, MAX_INT32, SCALE_GROUPS, SCALE_ROUNDINGS, grouped_scale_rows

if TYPE_CHECKING:
    from typing_extensions import Self

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of inputs and of products


class Checked:
    """A frozen dataclass that checks its fields, unless it is made by ``unchecked``."""

    __match_args__: ClassVar[tuple[str, ...]]

    @classmethod
    def unchecked(cls, *fields: Any, **named: Any) -> Self:
        """Of buffers that this package has just made or checked; by name is faster."""
        self = object.__new__(cls)
        if fields:
            named.update(zip(cls.__match_args__, fields, strict=False))
        for name, value in named.items():  # torch.compile of PyTorch 2.11 does not follow __dict__.update
            object.__setattr__(self, name, value)
        return self


def fail(name: str, expected: str, got: Any) -> NoReturn:
    """Raise the ValueError that every check here raises."""
    raise ValueError(f"{name}: {expected}, got {got}")


def check_tensor(
    name: str, value: Any, *, dtypes: Sequence[torch.dtype], ndim: int, dims: str, device: torch.device | None = None
) -> torch.Tensor:
    """A tensor of one of ``dtypes``, of rank ``ndim``, which ``dims`` describes, on ``device``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor {dims}, got {type(value).__name__}")
    if not is_tracing(value) and not has_memory(type(value)):
        hint = next((f", of which .{way}() is one" for way in ("to_local", "wait") if hasattr(value, way)), "")
        raise TypeError(f"{name}: must be a tensor with memory of its own, got {type(value).__name__}{hint}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: dtype must be {' or '.join(map(short, dtypes))}, got {short(value.dtype)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense tensor, got layout {short(value.layout)}")
    if value.ndim != ndim:
        fail(name, f"must have shape {dims}", tuple(value.shape))
    if device is not None and value.device != device:
        fail(name, f"must be on {device}, as the other arguments", value.device)
    return value


def check_devices(**arguments: Any) -> None:
    """One device for all that have one; the argument named is one that is not where most are."""
    places = [(name, a.device) for name, a in arguments.items() if isinstance(getattr(a, "device", None), torch.device)]
    devices = [device for _, device in places]
    if len(set(devices)) > 1:
        most = max(devices, key=devices.count)
        names = [name for name, device in places if device == most]
        name, device = next((name, device) for name, device in places if device != most)
        fail(name, f"must be on {most}, as {names[0]}", device)


def check_int(name: str, value: Any, least: int) -> int:
    """An int, not a bool, of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: must be an int, got {type(value).__name__}")
    if value < least:
        fail(name, f"must be at least {least}", value)
    return value


def check_num_tokens(value: Any, num_experts: int) -> None:
    """T: 32-bit offsets reach every row, and every scale row of ``num_experts`` experts."""
    if isinstance(value, torch.SymInt):  # left open by torch.export: a comparison would put a bound on it
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"num_tokens: must be an int, got {type(value).__name__}")
    if value < 0 or grouped_scale_rows(value, num_experts) > MAX_INT32:
        fail("num_tokens", "must be at least 0, and with each expert's padding fit int32", value)


def check_shape(name: str, value: torch.Tensor, shape: tuple[int, ...], dims: str) -> None:
    """Exactly this shape; ``dims`` says in letters what it is."""
    if value.shape != shape:
        fail(name, f"must have shape {dims} = {shape}", tuple(value.shape))


def check_contiguous(name: str, value: torch.Tensor) -> None:
    """Row-major without gaps."""
    if not value.is_contiguous():
        fail(name, "must be contiguous", f"shape {tuple(value.shape)} with strides {value.stride()}")


def check_aligned(name: str, value: torch.Tensor) -> None:
    """Starts at a 16-byte boundary, as every tensor does that PyTorch allocates."""
    if value.numel() and value.data_ptr() % 16:
        fail(name, "must start at a 16-byte boundary", f"address {value.data_ptr():#x}")


def check_no_overlap(name: str, written: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Check that it shares no byte with the others, each taken from its first to its last."""
    span = written.data_ptr(), written.data_ptr() + extent(written)
    for other, tensor in others.items():
        if tensor is not None:
            check_no_shared_byte(name, span, other, (tensor.data_ptr(), tensor.data_ptr() + extent(tensor)))


def check_no_shared_byte(name: str, span: tuple[int, int], other: str, other_span: tuple[int, int]) -> None:
    """No byte of one range of addresses is in the other."""
    (start, end), (other_start, other_end) = span, other_span
    if max(start, other_start) < min(end, other_end):
        addresses = f"addresses {start:#x} .. {end:#x}, and {other_start:#x} .. {other_end:#x}"
        fail(name, f"must not overlap {other}", addresses)


def extent(x: torch.Tensor) -> int:
    """Bytes from first to behind last: columns of a wider matrix count as one range."""
    if 0 in x.shape:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (1 + last) * x.dtype.itemsize


def check_k(name: str, k: int) -> None:
    """K is a positive multiple of the block size."""
    if k <= 0 or k % BLOCK_SIZE:
        fail(name, f"K must be a positive multiple of {BLOCK_SIZE}", k)


def check_n(name: str, n: int) -> None:
    """N % 8 == 0: rows of a 16-bit output start at 16-byte boundaries."""
    if n <= 0 or n % 8:
        fail(name, "N must be a positive multiple of 8", n)


def check_scale_rounding(value: Any) -> None:
    """One of the three roundings."""
    if not isinstance(value, str) or value not in SCALE_ROUNDINGS:
        fail("scale_rounding", f"must be one of {', '.join(SCALE_ROUNDINGS)}", repr(value))


def check_scale_group(value: Any, squares: Any = False) -> None:
    """32, or 128: four blocks with one scale, in ``squares`` those of 128 rows."""
    if type(value) is not int or value not in SCALE_GROUPS:
        fail("scale_group", f"must be {' or '.join(map(str, SCALE_GROUPS))}", repr(value))
    if not isinstance(squares, bool):
        raise TypeError(f"squares: must be a bool, got {type(squares).__name__}")
    if squares and value != 128:
        fail("squares", "must be False for groups of 32", squares)


def check_float_dtype(name: str, value: Any) -> None:
    """A dtype that tokens can have, and that a product can be written in."""
    if value not in FLOAT_DTYPES:
        raise TypeError(f"{name}: must be {' or '.join(map(short, FLOAT_DTYPES))}, got {short(value)}")


def check_no_grad(name: str, value: torch.Tensor) -> None:
    """Quantization has no derivative; a silent loss of gradients, or of forward-mode AD's tangents,
    would be worse than an error."""
    if value.requires_grad and torch.is_grad_enabled():
        hint = "MXFP8 quantization has no backward; use torch.no_grad() or .detach()"
        fail(name, f"must not require grad ({hint})", "requires_grad=True")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        fail(name, "must have no tangent (MXFP8 quantization has no derivative; use .detach())", "a dual tensor")


def check_unit_stride(name: str, value: torch.Tensor) -> None:
    """Elements of a row lie side by side."""
    if value.stride(-1) != 1 and value.numel():
        fail(name, "must have unit stride along its columns", f"strides {value.stride()}")


def check_unquantized(name: str, value: Any, dims: str) -> None:
    """Rows that can be quantized: bf16, fp16 or fp32, of any row stride."""
    check_tensor(name, value, dtypes=FLOAT_DTYPES, ndim=2, dims=dims)
    check_no_grad(name, value)
    check_unit_stride(name, value)


def check_choices(topk_ids: Any, topk_weights: Any, device: torch.device) -> None:
    """What a router gives: experts of each token, and their weights, both (M, top_k)."""
    check_tensor("topk_ids", topk_ids, dtypes=(torch.int32, torch.int64), ndim=2, dims="(M, top_k)", device=device)
    check_tensor("topk_weights", topk_weights, dtypes=FLOAT_DTYPES, ndim=2, dims="(M, top_k)", device=device)
    check_no_grad("topk_weights", topk_weights)


def is_tracing(x: torch.Tensor) -> bool:
    """Whether there are shapes alone: under torch.compile, vmap and the like, or ``x`` is fake or
    meta. Then the public functions go through the operators of ``ops.torch_library``."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or isinstance(x, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def is_tracing_any(*values: Any) -> bool:
    """Whether any tensor is so, of these and of the operands and layouts among them: vmap may be
    over any argument."""
    if torch.compiler.is_compiling():
        return True
    return any(
        is_tracing_any(*vars(value).values())
        if isinstance(value, Checked)
        else isinstance(value, torch.Tensor) and is_tracing(value)
        for value in values
    )


@functools.cache
def has_memory(kind: type) -> bool:
    """Whether tensors of a type have memory: those that intercept operators may wrap others."""
    return getattr(kind, "__torch_dispatch__", None) is torch._C._disabled_torch_dispatch_impl


def wait_for(*values: Any) -> tuple[Any, ...]:
    """The same, once they are there: functional collectives return tensors with no memory yet."""
    for value in values:  # nearly always plain tensors, in every call
        if type(value) is not torch.Tensor and isinstance(value, torch.Tensor) and hasattr(value, "wait"):
            return tuple(v.wait() if isinstance(v, torch.Tensor) and hasattr(v, "wait") else v for v in values)
    return values


def check_no_buffer(name: str, value: object) -> None:
    """No buffer to write to, where an operator allocates."""
    if value is not None:
        fail(name, "must be None under torch.compile, and for fake and meta tensors", type(value).__name__)


def short(value: Any) -> str:
    """A dtype without its ``torch.`` prefix."""
    return str(value).removeprefix("torch.")


def resolve_device(given: torch.device | str) -> torch.device:
    """The device of this name. Raises ValueError: no such device here."""
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: must be a torch.device or the name of one, got {given!r}") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device: there are {count} GPUs that this PyTorch can use, got {str(device)!r}")
    if device.type not in ("cpu", "cuda", "meta"):
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device: this PyTorch can't use {str(device)!r}") from error
    return device
