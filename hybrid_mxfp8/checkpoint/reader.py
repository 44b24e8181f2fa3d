"""Quantized experts on disk: safetensors files that follow published MXFP8 checkpoints.

A weight ``NAME`` (..., N, K) is stored as F8_E4M3, its scales as U8 (..., N, K/32), E8M0 bytes that
multiply the elements by 2^(b-127), row-major. They are written as ``NAME_scale_inv``, as in
MiniMax-M3-MXFP8 and SGLang; ``NAME_scale`` (ModelOpt) and ``.scale`` for ``.weight`` (DeepSeek) are
read as well, as is F8_E8M0. All multiply, in spite of ``_inv``.

Scales on disk are always row-major, those of an ``ExpertWeights`` always swizzled, and both can
have one shape: no function here takes or returns a bare scale tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from hybrid_mxfp8.checkpoint.fp8_blocks import SCALE_NAMES, block_scales
from hybrid_mxfp8.checkpoint.writer import Entry, SafetensorsWriter
from hybrid_mxfp8.core.checks import resolve_device
from hybrid_mxfp8.core.formats import BLOCK_SIZE
from hybrid_mxfp8.core.operands import ExpertWeights

SCALE_DTYPES: Final = ("U8", "F8_E8M0")
CONVERT_HINT: Final = ": convert it with `python -m hybrid_mxfp8 quantize`"
NO_MXFP4: Final = (
    "must be bf16, fp16, fp32 or FP8 to be converted, got MXFP4: transformers saves a bf16 copy of a model that it loaded"
    " with Mxfp4Config(dequantize=True)"
)
INDEX_FILE: Final = "model.safetensors.index.json"
METADATA: Final = {
    "mxfp8.version": "1",
    "mxfp8.element": "e4m3",
    "mxfp8.scale": "e8m0",
    "mxfp8.block": "1x32",
    "mxfp8.scale_layout": "linear",
}
"""What a file's header says beside ``format: pt``. A file may lack these, but one with other values
is refused."""


class Checkpoint:
    """The tensors of a safetensors file or a folder of them, open for reading; a context manager.

    Attributes:
        path: the file or folder.
        files: each file with the strings of its header.
        names: all tensors, in alphabetical order.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the headers of a file, or of a folder's files: those of its index, if it has one.

        Raises:
            ValueError: a file that is no safetensors file, or is cut short; an index that names
                what is not there.
            FileNotFoundError: no such file or folder.
        """
        self.path = Path(path)
        self.files: dict[Path, dict[str, str]] = {}
        self._found: dict[str, tuple[Path, Any]] = {}
        with contextlib.ExitStack() as stack:
            for file, expected in _files(self.path):
                handle = stack.enter_context(_open(file))
                names = set(handle.keys())
                self.files[file] = handle.metadata() or {}
                _check_metadata(file, self.files[file])
                if expected is not None and (absent := sorted(expected - names)):
                    raise ValueError(f"{file}: has no tensor {absent[0]!r}, which the index says it has")
                for name in names if expected is None else expected:
                    if name in self._found:
                        raise ValueError(f"{file}: tensor {name!r} is in another file of this folder, too")
                    self._found[name] = file, handle
            self._stack = stack.pop_all()
        self.names = sorted(self._found)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def metadata(self) -> dict[str, str]:
        """The strings of all headers together."""
        return {key: value for header in self.files.values() for key, value in header.items()}

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._found[name][0]

    def place(self, name: str) -> str:
        """The file that holds a tensor, and the tensor, for messages."""
        return f"{self._found[name][0] if name in self._found else self.path}: {name}"

    def entry(self, name: str) -> Entry:
        """Dtype and shape of a tensor, from the header; ValueError if there is none."""
        part = self.part(name)
        return Entry(name, str(part.get_dtype()), tuple(part.get_shape()))

    def part(self, name: str) -> Any:
        """The safetensors slice of a tensor: indexing it reads what is asked for."""
        return self._handle(name).get_slice(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU; ValueError if there is none."""
        tensor: torch.Tensor = self._handle(name).get_tensor(name)
        return tensor

    def _handle(self, name: str) -> Any:
        if name not in self._found:
            raise ValueError(f"{self.path}: has no tensor {name!r}")
        return self._found[name][1]

    def scale_of(self, name: str) -> str | None:
        """The name of a weight's scales, None if it has none; ValueError for two sets of them."""
        names = [f"{name}_scale_inv", f"{name}_scale"]
        if name.endswith(".weight"):
            names.append(name.removesuffix("weight") + "scale")
        found = [scale for scale in names if scale in self._found]
        if len(found) > 1:
            raise ValueError(f"{self.path}: {name!r} has two sets of scales, {found[0]!r} and {found[1]!r}")
        return found[0] if found else None

    def mxfp4_weight(self, name: str) -> str | None:
        """The weight that a name stands for if that is in MXFP4: its own name, or that of its
        ``_blocks`` or ``_scales``, ``.blocks`` or ``.scales`` in OpenAI's own files of gpt-oss."""
        weight = re.sub(r"[_.](blocks|scales)$", "", name)
        pairs = ({f"{weight}{mark}blocks", f"{weight}{mark}scales"} for mark in "_.")
        return weight if any(pair <= self._found.keys() for pair in pairs) else None


def find_experts(path: str | Path) -> dict[str, tuple[int, int, int]]:
    """The MXFP8 experts of a checkpoint: names for ``load_experts``, with (E, N, K).

    Stacked (E, N, K) tensors are listed by name; (N, K) matrices whose names differ in one number
    after ``experts.``, under a name with ``*`` in its place. Other quantized weights are not
    listed: attention's, or those whose scales are not MXFP8's. Whether numbers or shapes differ is
    for ``load_experts`` to say. Raises as ``Checkpoint`` does.
    """
    stacks: dict[str, tuple[int, int, int]] = {}
    with Checkpoint(path) as checkpoint:
        for name in checkpoint.names:
            entry = checkpoint.entry(name)
            if not is_mxfp8(checkpoint, entry):
                continue
            *stack, n, k = entry.shape
            if len(stack) == 1:
                stacks[name] = (stack[0], n, k)
            elif not stack and (match := re.fullmatch(r"(.*\bexperts\.)\d+(\..*)", name)):
                pattern = f"{match[1]}*{match[2]}"
                stacks[pattern] = (stacks.get(pattern, (0,))[0] + 1, n, k)
    return stacks


def is_mxfp8(checkpoint: Checkpoint, weight: Entry) -> bool:
    """Whether a tensor is e4m3 with MXFP8's scales."""
    if weight.dtype != "F8_E4M3" or len(weight.shape) < 2 or (name := checkpoint.scale_of(weight.name)) is None:
        return False
    scale = checkpoint.entry(name)
    return scale.dtype in SCALE_DTYPES and scale.shape == scale_entry(weight.name, weight.shape).shape


def load_experts(
    path: str | Path,
    names: str | Sequence[str],
    *,
    experts: range | None = None,
    device: torch.device | str | None = None,
) -> ExpertWeights:
    """Experts of a checkpoint, ready for ``grouped_gemm``.

    Args:
        path: a safetensors file, or a folder of a checkpoint.
        names: a stacked tensor (E, N, K); or a name with ``*`` for the expert's number, whose (N,
            K) matrices are stacked; or several of either, joined along N in this order:
            ``[gate, up]`` makes w13 for ``moe_forward``.
        experts: numbers of those to load, such as a rank's ``range(first, end)``; default all. Of
            the others only the files' headers are read.
        device: where the result goes; default the CPU. One matrix at a time is on the CPU.

    Raises:
        TypeError: ``names`` is neither a string nor a sequence of strings, or ``experts`` no range.
        ValueError: no such device, tensor or expert, an expert's number missing, dtypes or shapes
            that are not MXFP8 or don't fit together, or a file that can't be read.
        FileNotFoundError: no such file or folder.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names: must be a string or a sequence of strings, got {names!r}")
    if experts is not None and not isinstance(experts, range):
        raise TypeError(f"experts: must be a range of experts' numbers, got {type(experts).__name__}")
    device = None if device is None else resolve_device(device)
    if not names:
        raise ValueError("names: must name at least one tensor, got none")
    with Checkpoint(path) as checkpoint:
        columns = [_members(checkpoint, name) for name in names]
        shapes = [_stack_shape(checkpoint, name, members) for name, members in zip(names, columns, strict=True)]
        num_experts, _, k = shapes[0]
        for name, shape in zip(names, shapes, strict=True):
            if (shape[0], shape[2]) != (num_experts, k):
                wanted = f"E = {num_experts} and K = {k} as {names[0]}"
                raise ValueError(f"{name}: must have {wanted}, got (E, N, K) {shape}")
        if experts is None:
            experts = range(num_experts)
        elif not experts or min(experts) < 0 or max(experts) >= num_experts:
            raise ValueError(f"experts: must be numbers of 0 .. {num_experts - 1}, at least one, got {experts}")
        rows = [shape[1] for shape in shapes]
        values = torch.empty(len(experts), sum(rows), k, dtype=torch.uint8, device=device)
        scales = torch.empty(len(experts), sum(rows), k // BLOCK_SIZE, dtype=torch.uint8, device=device)
        for members, *parts in zip(columns, values.split(rows, 1), scales.split(rows, 1), strict=True):
            for (name, index), v, s in zip((members[e] for e in experts), *parts, strict=True):
                scale_name = checkpoint.scale_of(name)
                assert scale_name is not None
                v.copy_(_matrix(checkpoint, name, index))
                s.copy_(_matrix(checkpoint, scale_name, index))
    return ExpertWeights.from_linear_scales(values, scales)


def count_experts(path: str | Path, name: str) -> int:
    """E of a name that :func:`load_experts` takes; only headers are read. Raises as it does."""
    with Checkpoint(path) as checkpoint:
        return len(_members(checkpoint, name))


def save_experts(path: str | Path, experts: Mapping[str, ExpertWeights], *, force: bool = False) -> None:
    """Write experts to a safetensors file: each a stacked (E, N, K) tensor and its scales.

    Args:
        path: the file; it appears when it is complete.
        experts: weights by the name that the tensor gets.
        force: replace a file that exists.

    Raises:
        FileExistsError: the file exists and ``force`` is not set.
        TypeError: ``experts`` maps something else than names to ExpertWeights.
        ValueError: two tensors of one name, a name that the format can't hold or with a ``*``, or
            weights on meta or with an empty dimension.
    """
    if not isinstance(experts, Mapping):
        raise TypeError(f"experts: must map names to ExpertWeights, got {type(experts).__name__}")
    for name, w in experts.items():
        if not isinstance(name, str) or not isinstance(w, ExpertWeights):
            raise TypeError(f"experts: must map names to ExpertWeights, got {name!r}: {type(w).__name__}")
        if name in ("", "__metadata__"):
            raise ValueError(f"experts: a tensor can't be called {name!r} in a safetensors file")
        if "*" in name:
            raise ValueError(f"experts: {name!r} must have no *, which load_experts takes for experts' numbers")
        if w.values.is_meta:
            raise ValueError(f"experts: {name!r} must have data, got tensors on meta")
        if not w.values.numel():  # load_experts refuses it
            raise ValueError(f"experts: {name!r} must have no empty dimension, got {tuple(w.values.shape)}")
    path = Path(path)
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{path}: exists; force=True replaces it")
    weights = [Entry(name, "F8_E4M3", tuple(w.values.shape)) for name, w in experts.items()]
    entries = [*weights, *(scale_entry(w.name, w.shape) for w in weights)]
    with SafetensorsWriter(path, entries, {"format": "pt", **METADATA}) as writer:
        for name, w in experts.items():
            writer.append(name, w.values)
            writer.append(f"{name}_scale_inv", w.linear_scales())


def scale_entry(name: str, shape: tuple[int, ...]) -> Entry:
    """The scales that go with a weight of this name and shape."""
    return Entry(f"{name}_scale_inv", "U8", (*shape[:-1], shape[-1] // BLOCK_SIZE))


Member = tuple[str, int | None]  # an expert's matrix: a tensor, and its place if that is a stack


def _members(checkpoint: Checkpoint, name: str) -> list[Member]:
    """Where each expert's matrix is, in order of their numbers."""
    if "*" not in name:
        if checkpoint.mxfp4_weight(name):
            raise ValueError(f"{checkpoint.place(name)}: {NO_MXFP4}")
        shape, place = checkpoint.entry(name).shape, checkpoint.place(name)
        if len(shape) != 3:
            raise ValueError(f"{place}: must have shape (E, N, K), or a * in place of the expert's number, got {shape}")
        if 0 in shape:  # a file of no bytes may claim any E
            raise ValueError(f"{place}: must have no empty dimension, got {shape}")
        return [(name, e) for e in range(shape[0])]
    before, _, after = name.partition("*")
    if "*" in after:
        raise ValueError(f"names: {name!r} must have one * at most")
    pattern = re.compile(f"{re.escape(before)}(0|[1-9][0-9]{{0,8}}){re.escape(after)}")
    numbers = sorted(int(match[1]) for found in checkpoint.names if (match := pattern.fullmatch(found)))
    if not numbers:
        raise ValueError(f"{checkpoint.path}: has no tensor {name!r} with a number for the *")
    if numbers != list(range(len(numbers))):
        absent = next(e for e, number in enumerate(numbers) if e != number)
        raise ValueError(f"{name}: experts must be numbered 0 .. {numbers[-1]}, number {absent} is missing")
    return [(f"{before}{e}{after}", None) for e in numbers]


def _stack_shape(checkpoint: Checkpoint, name: str, members: list[Member]) -> tuple[int, int, int]:
    """(E, N, K) of matrices that are all MXFP8 and of one shape."""
    shapes = {_check_pair(checkpoint, member)[-2:] for member in dict.fromkeys(member for member, _ in members)}
    if len(shapes) != 1:
        raise ValueError(f"{name}: experts must have one shape, got {sorted(shapes) or 'no experts'}")
    ((n, k),) = shapes
    return len(members), n, k


def _check_pair(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Check that a weight and its scales are MXFP8; returns its shape."""
    weight, place = checkpoint.entry(name), checkpoint.place(name)
    if weight.dtype != "F8_E4M3":
        hint = CONVERT_HINT if weight.dtype in ("BF16", "F16", "F32") else ""
        raise ValueError(f"{place}: dtype must be F8_E4M3, got {weight.dtype}{hint}")
    if len(weight.shape) not in (2, 3):
        raise ValueError(f"{place}: must have shape (N, K) or (E, N, K), got {weight.shape}")
    if weight.shape[-1] % BLOCK_SIZE or not weight.shape[-1]:
        raise ValueError(f"{place}: K must be a positive multiple of {BLOCK_SIZE}, got {weight.shape[-1]}")
    if 0 in weight.shape:
        raise ValueError(f"{place}: must have no empty dimension, got {weight.shape}")
    scale_name = checkpoint.scale_of(name)
    if scale_name is None:
        raise ValueError(f"{place}: has no scales: neither {name}_scale_inv nor {name}_scale is there")
    scale = checkpoint.entry(scale_name)
    expected = scale_entry(name, weight.shape).shape
    if scale.shape != expected and block_scales(checkpoint, weight):
        got = f"FP8 with one {SCALE_NAMES[scale.dtype]} scale a 128x128 block"
        raise ValueError(f"{place}: must be MXFP8, got {got}{CONVERT_HINT}")
    place = checkpoint.place(scale_name)
    if scale.dtype not in SCALE_DTYPES:
        other = "these are not MXFP8's scales, but perhaps those of FP8 of whole rows or tensors"
        raise ValueError(f"{place}: dtype must be U8 or F8_E8M0, got {scale.dtype}: {other}")
    if scale.shape != expected:
        raise ValueError(f"{place}: must have shape (..., N, K/32) = {expected}, row-major, got {scale.shape}")
    return weight.shape


def _matrix(checkpoint: Checkpoint, name: str, index: int | None) -> torch.Tensor:
    """The bytes of one expert's matrix."""
    tensor = checkpoint.tensor(name) if index is None else checkpoint.part(name)[index]
    return tensor.view(torch.uint8)


def _check_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    for key, expected in METADATA.items():
        if key in metadata and metadata[key] != expected:
            raise ValueError(f"{file}: {key} must be {expected!r} for this version to read it, got {metadata[key]!r}")


def checkpoint_files(path: Path) -> list[Path]:
    """A checkpoint's safetensors files: those of a folder's index, or all if it has none.

    Raises:
        ValueError: an index that can't be read, or names a file that is not there.
        FileNotFoundError: no such file or folder, or a folder with no safetensors file.
    """
    return [file for file, _ in _files(path)]


def _files(path: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The files of a checkpoint, each with the tensors that an index expects of it."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        yield path, None
        return
    index = path / INDEX_FILE
    if not index.exists():
        if not (files := sorted(path.glob("*.safetensors"))):
            raise FileNotFoundError(f"{path}: has no safetensors file")
        yield from ((file, None) for file in files)
        return
    by_file: dict[str, set[str]] = {}
    for name, file_name in _read_index(index).items():
        by_file.setdefault(file_name, set()).add(name)
    for file_name, expected in sorted(by_file.items()):
        if not (path / file_name).is_file():
            raise ValueError(f"{index}: names the file {file_name!r}, which is not there")
        yield path / file_name, expected


def _read_index(index: Path) -> dict[str, str]:
    """The name of the file that holds each tensor; it may be a link, as in a hub's cache."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index}: must have a weight_map of tensors to files")
    for file_name in weight_map.values():
        if Path(file_name).name != file_name:
            raise ValueError(f"{index}: must name files of its own folder, got {file_name!r}")
    return weight_map


def read_json(file: Path) -> Any:
    """The content of a JSON file; ValueError if it is no JSON, or has a key twice."""
    return _parse_json(file, file.read_bytes())


def _parse_json(file: Path, content: bytes) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
        return found

    try:
        return json.loads(content, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is no JSON: {error}") from error


def _open(file: Path) -> Any:
    """An open safetensors file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ModuleNotFoundError("safetensors is needed for checkpoints: pip install safetensors") from error
    if not file.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{file}: is no regular file" + (", but a link to nothing" if not file.exists() else ""))
    try:
        handle = safe_open(file, framework="pt", device="cpu")
        # Refuses two tensors of one name: the library takes the last, other readers the first.
        with file.open("rb") as opened:
            _parse_json(file, opened.read(int.from_bytes(opened.read(8), "little")))
    except SafetensorError as error:
        raise ValueError(f"{file}: is no complete safetensors file: {error}") from error
    except OSError as error:
        raise ValueError(f"{file}: can't be read: {error.strerror or error}") from error
    return handle
