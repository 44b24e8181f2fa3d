"""transformers (5.7 or newer): mixture-of-experts models with MXFP8 experts, for inference.

    from hybrid_mxfp8.integrations import transformers as mxfp8

    model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
    print(mxfp8.quantize_model_(model))

Without ``quantize_model_``, a model loaded with ``experts_implementation="hybrid_mxfp8"`` after
``register()`` quantizes each layer's experts in its first forward, beside the originals, and again
after a parameter was replaced or written in place. Writes through ``parameter.data`` are not
noticed. Where other changes would not be noticed either, ``quantize_model_`` must come first, and
an error says so.

Any model whose experts transformers dispatches through its ExpertsInterface can take part, if its
gate is a SwiGLU and H and I are multiples of 32; docs/transformers.md has the details.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import weakref
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.nn.utils import parametrize

from hybrid_mxfp8 import reference
from hybrid_mxfp8.checkpoint.fp8_blocks import BLOCK, quantize_fp8_blocks, scales_shape
from hybrid_mxfp8.core.activation import SwiGLU
from hybrid_mxfp8.core.checks import FLOAT_DTYPES, check_scale_group, fail, resolve_device, short
from hybrid_mxfp8.core.formats import BLOCK_SIZE
from hybrid_mxfp8.dispatch.device import preferred_scale_group
from hybrid_mxfp8.dispatch.registry import requested
from hybrid_mxfp8.ops.experts import MXFP8Experts, TensorState, group_into_squares_

__all__ = ["MemorySaved", "quantize_model_", "register"]

NAME = "hybrid_mxfp8"  # the value of ``experts_implementation``
WEIGHTS = ("gate_up_proj", "down_proj")
BIASES = ("gate_up_proj_bias", "down_proj_bias")
FP8_SCALES = ("gate_up_proj_scale_inv", "down_proj_scale_inv")

KNOWN_OPTIONS = ("experts_class", "experts_interface", "is_concatenated", "is_transposed", "has_bias", "has_gate")
"""Of transformers' ``use_experts_implementation``: how a model says what its experts are."""

_OWNED = "mxfp8"  # submodule of an experts module that ``quantize_model_`` has been through
_CACHE: weakref.WeakKeyDictionary[torch.nn.Module, tuple[MXFP8Experts, list[TensorState]]] = weakref.WeakKeyDictionary()
"""The experts of modules that their forward quantized, and the parameters that they were made of.
In no state_dict, and in no copy."""

logger = logging.getLogger("hybrid_mxfp8")


def register() -> None:
    """Make ``experts_implementation="hybrid_mxfp8"`` known to transformers; again is harmless.

    Raises:
        ImportError: no transformers whose models take a registered name, as they do from 5.7 on.
    """
    try:
        from transformers import __version__
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(f"needs transformers 5.7 or newer, with its ExpertsInterface: {error}") from error
    if tuple(map(int, __version__.split(".")[:2])) < (5, 7):  # which refuses every name but its own
        raise ImportError(f"needs transformers 5.7 or newer, whose models take a registered name, got {__version__}")
    ExpertsInterface.register(NAME, experts_forward)
    with contextlib.suppress(ImportError):  # versions that don't dispatch FP8 experts
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface

        FP8ExpertsInterface.register(NAME, experts_forward)


def experts_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of an experts module of transformers, in MXFP8: hidden_states (M, H), ids and
    weights (M, top_k) to (M, H). ValueError for experts that MXFP8Experts can't compute or that
    ``quantize_model_`` has to quantize first."""
    experts = getattr(module, _OWNED, None) or _quantized(module)
    result: torch.Tensor = experts(hidden_states, top_k_index, top_k_weights)
    return result


def _is_fp8(module: torch.nn.Module) -> bool:
    return any(getattr(module, name).dtype == torch.float8_e4m3fn for name in WEIGHTS)


def _parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights, biases and scales by name; of a DTensor this rank's shard."""
    biases = BIASES if getattr(module, "has_bias", False) else ()
    names = (*WEIGHTS, *biases, *(FP8_SCALES if _is_fp8(module) else ()))
    found = ((name, getattr(module, name)) for name in names)
    return {name: p.to_local() if hasattr(p, "to_local") else p for name, p in found}


def _unproven(parameters: list[torch.Tensor]) -> str | None:
    """When to quantize, because a change of the parameters would not show later; None if it would.
    FSDP gathers into the same tensor and restores its version, DTensor hands out a new one each
    time, and collectives write without counting: all of them need a process group. A compiled or
    captured forward does not ask again, inference tensors count no writes, and other processes
    count their own."""
    if torch.compiler.is_compiling():
        return "before torch.compile traces them"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "where torch.distributed is in use (FSDP: before fully_shard)"
    if any(p.is_cuda for p in parameters) and torch.cuda.is_current_stream_capturing():
        return "before a CUDA graph captures them"
    if any(p.is_inference() for p in parameters):
        return "if they are inference tensors, which count no writes"
    if any(p.device.type == "cpu" and p.is_shared() for p in parameters):
        return "if other processes share their memory"
    return None


def _quantized(module: torch.nn.Module) -> MXFP8Experts:
    """The module's experts, from the cache while its parameters are those that were quantized."""
    # Without experts _quantize says what is wrong.
    parameters = [p for p in _parameters(module).values() if p is not None] if _has_experts(module) else []
    if (where := _unproven(parameters)) is not None:
        fail("experts", f"must be quantized by quantize_model_(model) {where}", type(module).__name__)
    experts, states = _CACHE.get(module, (None, []))
    if experts is None or len(states) != len(parameters) or not all(map(TensorState.holds, states, parameters)):
        states = list(map(TensorState, parameters))  # before they are read
        experts, _ = _CACHE[module] = _quantize(module), states
    return experts


def _activation(module: torch.nn.Module) -> SwiGLU | None:
    """The activation of an experts module; None if its gate function is no SwiGLU. Found by trying,
    not by the class's name: with the module's numbers, its function and ours agree on values on
    both sides of the limit, in the order of rows that the module says it has."""
    options = [getattr(module, name, None) for name in ("swiglu_alpha", "alpha", "swiglu_limit", "limit")]
    found = [n if isinstance(n, (int, float)) and 0 < n < math.inf else None for n in options]
    alphas = {1.0 if alpha is None else float(alpha) for alpha in (*found[:2], None)}
    beyond = [sign * 2.0 * limit for limit in found[2:] if limit is not None for sign in (-1, 1)]
    numbers = [*(0.5 * i for i in range(-60, 61)), *beyond]
    line = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    gate, up = torch.cartesian_prod(line, line).T.reshape(2, -1, 1).expand(-1, -1, 2).clone()
    gate[:, 1] *= -1
    gate_up = torch.cat((gate, up), 1)
    given = gate_up if module.is_concatenated else torch.stack((gate, up), 2).flatten(1)
    try:
        theirs = module._apply_gate(given)  # type: ignore[operator]
        for activation in itertools.starmap(SwiGLU, itertools.product(alphas, (0.0, 1.0), {*found[2:], None})):
            ours = reference.swiglu(gate_up, activation)
            if theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5):
                return activation
    except Exception:  # whatever a function that is no such gate makes of two columns
        logger.debug("%s._apply_gate", type(module).__name__, exc_info=True)
    return None


def why_not(module: torch.nn.Module) -> str | None:
    """What keeps an experts module from being computed here; None if nothing does."""
    from transformers.integrations.moe import _default_apply_gate

    if (option := _unknown_option(module)) is not None:
        return f"{option} is not supported"
    if not getattr(module, "has_gate", False):
        return "it has no gate"
    if _activation(module) is None:
        if getattr(type(module), "_apply_gate", None) is not _default_apply_gate or not module.is_concatenated:
            return f"its gate function is no SwiGLU{'' if module.is_concatenated else ' of rows in turns'}"
        name = getattr(module.act_fn, "__name__", type(module.act_fn).__name__)
        return f"its activation is {name}, not SiLU"
    parameters = _parameters(module)
    down = parameters["down_proj"]
    if down.shape[0] != getattr(module, "num_experts", down.shape[0]):
        return f"{down.shape[0]} of its {module.num_experts} experts are here"
    hidden, intermediate = sorted((1, 2), reverse=bool(module.is_transposed))
    if down.shape[hidden] % BLOCK_SIZE or down.shape[intermediate] % BLOCK_SIZE:
        return f"its H = {down.shape[hidden]} and I = {down.shape[intermediate]} are not both multiples of {BLOCK_SIZE}"
    if _is_fp8(module):
        return _why_not_fp8(module, parameters)
    wrong = [short(p.dtype) for p in parameters.values() if p.dtype not in FLOAT_DTYPES]
    return f"its weights are {wrong[0]}" if wrong else None


def _unknown_option(module: torch.nn.Module) -> str | None:
    """An option of a later transformers that these experts set; None if there is none."""
    from transformers.integrations.moe import use_experts_implementation

    for name, option in inspect.signature(use_experts_implementation).parameters.items():
        if name not in KNOWN_OPTIONS and getattr(module, name, option.default) != option.default:
            return f"{name} = {getattr(module, name)!r}"
    return None


def _why_not_fp8(module: torch.nn.Module, parameters: dict[str, torch.Tensor]) -> str | None:
    for name, scale_name in zip(WEIGHTS, FP8_SCALES, strict=True):
        weight, shape = parameters[name], getattr(parameters[scale_name], "shape", None)
        if shape == (*weight.shape[:2], weight.shape[2] // BLOCK_SIZE):  # of `python -m hybrid_mxfp8 quantize`, say
            return f"its {name} is MXFP8 already: load the checkpoint that it was made from"
        if weight.dtype != torch.float8_e4m3fn or shape != scales_shape(weight.shape):
            return f"its {name} is not FP8 with a scale for each block of {BLOCK}x{BLOCK}"
    if module.is_transposed or module.has_bias or not module.is_concatenated:
        return "it is FP8 with a bias, transposed or interleaved"
    intermediate = parameters["down_proj"].shape[2]
    if intermediate % BLOCK:  # a block of scales would be gate's and up's
        return f"it is FP8 and its I = {intermediate} is no multiple of {BLOCK}"
    return None


def _quantize(
    module: torch.nn.Module,
    backend: str | None = None,
    device: torch.device | None = None,
    scale_group: int | None = None,
) -> MXFP8Experts:
    reason = why_not(module)
    if reason is not None:
        fail("experts", "must be SwiGLU experts", f"{type(module).__name__}: {reason}")
    activation = _activation(module)
    assert activation is not None, "why_not has found one"
    with torch.no_grad():
        if _is_fp8(module):
            w13, w2, *scales = _parameters(module).values()
            group = scale_group or preferred_scale_group(device or w13.device)
            options: dict[str, Any] = {"scale_group": group, "device": device, "backend": backend}
            w13q, w2q = (quantize_fp8_blocks(*pair, **options) for pair in zip((w13, w2), scales, strict=True))
            if scale_group is None:
                w13q, w2q = group_into_squares_(w13q), group_into_squares_(w2q)
            return MXFP8Experts(w13q, w2q, activation=activation, backend=backend)
        w13, w2, *biases = (p.to(device) for p in _parameters(module).values())
        w13_bias, w2_bias = biases or (None, None)
        order = {"transposed": bool(module.is_transposed), "interleaved": not module.is_concatenated}
        options = {"scale_group": scale_group, "activation": activation, "backend": backend}
        return MXFP8Experts.from_weights(w13, w2, w13_bias=w13_bias, w2_bias=w2_bias, **order, **options)


@dataclass(frozen=True)
class MemorySaved:
    """What quantizing did to the experts' size, in bytes; printed, it says so in words."""

    layers: int
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.bytes_after / self.bytes_before

    def __str__(self) -> str:
        layers = f"{self.layers} MoE layer" + ("s" if self.layers != 1 else "")
        sizes = f"{_size(self.bytes_after)} in MXFP8 instead of {_size(self.bytes_before)}"
        saved = self.bytes_before - self.bytes_after  # FP8 in larger blocks has fewer scales
        change = f"{_size(abs(saved))} {'saved' if saved >= 0 else 'more'}"
        return f"the experts of {layers} take {sizes}: {change}, {self.ratio:.3f} of the memory"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


def quantize_model_(
    model: torch.nn.Module,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    scale_group: int | None = None,
    backend: str | None = None,
) -> MemorySaved:
    """Quantize the experts of every MoE layer in place and switch the model to this implementation.

    One layer at a time: the peak is one layer's MXFP8 experts above what the model took, and on
    Hopper one expert in fp32.
    Afterwards the state_dict holds the quantized bytes (``….experts.mxfp8.w13_values`` and so on)
    in place of the parameters, and ``save_pretrained`` and another implementation are refused;
    the way back is to load the model again. FP8 experts are dequantized first, one at a time. With
    tensor or expert parallelism each rank quantizes its shard; FSDP must come after this, and
    leaves quantized experts whole on each rank.

    Args:
        model: a PreTrainedModel.
        device: where each layer's experts are quantized and stay; default: where they are. From a
            model on the CPU, a GPU thus gets one layer's unquantized experts at a time.
        progress: show a progress bar on stderr.
        scale_group: of the weights, as in ``MXFP8Experts.from_weights``: None: squares of 128x128
            on Hopper, else 32.
        backend: of the quantization and the forward; None: as everywhere.

    Returns the memory saved; ``print`` it for a sentence.

    Raises:
        ImportError: no transformers whose models take a registered name, as they do from 5.7 on.
        ValueError: no such device or group, no MoE layer, one that can't be quantized, is offloaded
            or is under FSDP, a model that is quantized already or no PreTrainedModel; then nothing
            has been changed.
        BackendUnavailableError: the named backend can't quantize here; likewise.
    """
    from tqdm import tqdm

    register()
    if scale_group is not None:
        check_scale_group(scale_group)
    requested(backend)
    where = None if device is None else resolve_device(device)
    found = [(name, m) for name, m in model.named_modules() if _has_experts(m)]
    if not found:
        if any(hasattr(m, _OWNED) for m in model.modules()):
            fail("model", "must have experts that are not quantized yet", f"{type(model).__name__}, quantized already")
        what = "MoE layers that transformers dispatches through its ExpertsInterface"
        fail("model", f"must have {what}", type(model).__name__)
    if not hasattr(model, "set_experts_implementation"):
        fail("model", "must be a PreTrainedModel, not what wraps one", type(model).__name__)
    if (name := _fully_sharded(model)) is not None:
        fail("model", "must be quantized before FSDP shards it: quantize_model_, then fully_shard", f"FSDP at {name!r}")
    offloading = any(hasattr(m, "_hf_hook") for m in model.modules())  # accelerate's
    some_memory = any(not p.is_meta for p in model.parameters()) or not (where is None or where.type == "meta")
    for name, module in found:
        reason = why_not(module)
        if reason is not None:
            fail("model", "must have SwiGLU experts", f"{name} ({type(module).__name__}): {reason}")
        if (some_memory or offloading) and any(p.is_meta for p in _parameters(module).values()):
            fail("model", "must have all experts in memory, not offloaded by a device_map", f"{name} on meta")
        if parametrize.is_parametrized(module):
            fail("model", "must have plain parameters (see remove_parametrizations)", f"{name}, parametrized")
    before = after = 0
    for _, module in tqdm(found, desc="quantize experts", unit="layer", disable=not progress, dynamic_ncols=True):
        before += sum(p.nbytes for p in _parameters(module).values())
        experts = _quantize(module, backend, where, scale_group)
        # Not before there are experts: a backend that can't run here leaves the model as it was.
        model.set_experts_implementation(NAME)  # type: ignore[operator]  # a PreTrainedModel
        after += sum(buffer.nbytes for buffer in experts.buffers())
        # The names stay, as parameters that are None, for code that looks for them.
        for parameter in _parameters(module):
            module.register_parameter(parameter, None)
        _CACHE.pop(module, None)
        module.add_module(_OWNED, experts)
        module.register_forward_pre_hook(_refuse_other_forward)
        module.register_load_state_dict_pre_hook(_refuse_originals)
        _forbid_what_needs_the_originals(model)  # from the first layer on, should a later one fail
    saved = MemorySaved(len(found), before, after)
    logger.info("%s", saved)
    return saved


def _forbid_what_needs_the_originals(model: torch.nn.Module) -> None:
    """In the model and the models within, which would else fail late, or save made-up experts."""
    for module in model.modules():
        for name, refuse in (("save_pretrained", _refuse_to_save), ("set_experts_implementation", _refuse_another)):
            if hasattr(module, name):
                object.__setattr__(module, name, refuse)


def _fully_sharded(model: torch.nn.Module) -> str | None:
    """The name of a module within that FSDP manages, with experts inside; None if there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    with_experts = ((n, m) for n, m in model.named_modules() if any(map(_has_experts, m.modules())))
    return next((n for n, m in with_experts if isinstance(m, (FSDPModule, FullyShardedDataParallel))), None)


def _refuse_other_forward(module: torch.nn.Module, args: object) -> None:
    """Refuse another implementation, however it was set: its parameters are gone."""
    _refuse_another(module.config._experts_implementation)  # type: ignore[union-attr]


def _refuse_originals(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
    """Refuse unquantized experts: with ``strict=False`` they would be skipped without a word."""
    names = [prefix + name for name in (*WEIGHTS, *BIASES, *FP8_SCALES)]
    if (given := next((name for name in names if name in state_dict), None)) is not None:
        raise ValueError(
            f"state_dict: must hold quantized experts, {prefix}{_OWNED}.w13_values and so on, for a model that"
            f" quantize_model_ has been through, got {given}: load it into a new model and quantize that"
        )


def _refuse_to_save(*args: object, **options: object) -> NoReturn:
    raise RuntimeError(
        "save_pretrained: must have experts as they were loaded, got a model that quantize_model_ has been through: keep the"
        " original checkpoint, and quantize at each start, or save model.state_dict()"
    )


def _refuse_another(experts_implementation: object) -> None:
    if experts_implementation != NAME:
        raise ValueError(
            f"experts_implementation: must be {NAME!r} for a model that quantize_model_ has been through, got"
            f" {experts_implementation!r}: load the model again"
        )


def _has_experts(module: torch.nn.Module) -> bool:
    """Whether it is an experts module with its parameters in place."""
    weights = [getattr(module, name, None) for name in WEIGHTS]
    decorated = hasattr(module, "is_concatenated") and hasattr(module, "has_gate")
    return decorated and all(isinstance(w, torch.Tensor) and w.ndim == 3 for w in weights)
