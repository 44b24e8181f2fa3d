"""Checkpoints that lie, results that can't be written: a named error, never half a file."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from files import quantize, same_experts, write_folder
from forked import Child
from safetensors.torch import load_file, save_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import convert, writer
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.checkpoint.writer import Entry, SafetensorsWriter

VALUES, SCALES = 2 * 8 * 32, 2 * 8
"""Bytes of (2, 8, 32) experts."""

DATA = bytes(range(64)) * 8 + bytes([127] * SCALES)
ALL = ("--experts", "*.experts.*")


def tensor(dtype: str, shape: list[Any], start: int = 0, end: int = VALUES) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def scales(dtype: str, shape: list[Any], start: int = VALUES, end: int = VALUES + SCALES) -> dict[str, Any]:
    return tensor(dtype, shape, start, end)


def header(**changes: Any) -> dict[str, Any]:
    """A right one, but for what is changed, or left out where None is given."""
    good = {"w": tensor("F8_E4M3", [2, 8, 32]), "w_scale_inv": scales("U8", [2, 8, 1])}
    return {name: entry for name, entry in (good | changes).items() if entry is not None}


def write(path: Path, header: object, data: bytes = DATA, *, length: int | None = None) -> Path:
    """A safetensors file; the header as JSON or as it is, its length right or as claimed."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


# ---------------------------------------------------------------- lies

TWICE = b'{"w":{"dtype":"F8_E4M3","shape":[2,8,32],"data_offsets":[0,512]},"w":{"dtype":"U8","shape":[512],"data_offsets":[0,512]}}'

NOT_COMPLETE = "is no complete safetensors file"
HEADERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "length of 2^64 - 1": (header(), {"length": 2**64 - 1}, NOT_COMPLETE),
    "length beyond the file": (header(), {"length": 5000}, NOT_COMPLETE),
    "no JSON": (b"MZ\x90\x00", {}, NOT_COMPLETE),
    "nested without end": (b"[" * 100_000, {}, NOT_COMPLETE),
    "shape larger than data": (header(w=tensor("F8_E4M3", [2, 8, 64])), {}, NOT_COMPLETE),
    "shape beyond 2^64": (header(w=tensor("F8_E4M3", [2**62, 8, 32])), {}, NOT_COMPLETE),
    "a negative dimension": (header(w=tensor("F8_E4M3", [-2, -8, 32])), {}, NOT_COMPLETE),
    "overlap": (header(w_scale_inv=scales("U8", [2, 8, 1], VALUES - 8, VALUES + 8)), {}, NOT_COMPLETE),
    "a hole": (header(w_scale_inv=scales("U8", [8], VALUES + 8)), {}, NOT_COMPLETE),
    "beyond the end": (header(), {"data": DATA[:-1]}, NOT_COMPLETE),
    "data that no tensor has": (header(), {"data": DATA + b"more"}, NOT_COMPLETE),
    "unknown dtype": (header(w=tensor("F8_E9M9", [2, 8, 32])), {}, NOT_COMPLETE),
    "one tensor twice": (TWICE, {"data": DATA[:VALUES]}, "'w' is there twice"),
    "other fp8": (header(w=tensor("F8_E5M2", [2, 8, 32])), {}, "w: dtype must be F8_E4M3, got F8_E5M2"),
    "no weight": (header(w=None, w_scale_inv=scales("U8", [16], 0, 16)), {"data": b"1" * 16}, "has no tensor 'w'"),
    **{
        f"{e} experts of {n} rows": ({"w": tensor("F8_E4M3", [e, n, 32], 0, 0), "w_scale_inv": tensor("U8", [e, n, 1], 0, 0)}, {"data": b""}, "empty")
        for e, n in ((0, 8), (2**40, 0))
    },
}  # fmt: skip


@pytest.mark.parametrize("how", HEADERS)
def test_headers_that_lie(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loading names the file and the fault, converting does the same and writes nothing."""
    lie, how_written, message = HEADERS[how]
    path = write(tmp_path / "lie.safetensors", lie, **how_written)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load_experts(path, "w")
    assert str(path) in str(caught.value)
    assert quantize(path, tmp_path / "out.safetensors", "--experts", "*") == 2
    assert "quantize: " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_file_without_lies(tmp_path: Path) -> None:
    """What the lies are made of is right, so each of them is refused for itself."""
    loaded = checkpoint.load_experts(write(tmp_path / "m.safetensors", header()), "w")
    assert loaded.values.view(torch.uint8).flatten().tolist() == list(DATA[:VALUES])


def test_any_flipped_bit_of_the_header(tmp_path: Path) -> None:
    """A named error; or the same experts, where a bit means nothing, as one of ``format``."""
    path = write(tmp_path / "flip.safetensors", {"__metadata__": {"format": "pt"}, **header()})
    whole = path.read_bytes()
    truth = checkpoint.load_experts(path, "w")
    refusals, bits = [], range(8 * (len(whole) - len(DATA)))
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            loaded = checkpoint.load_experts(path, "w")
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert same_experts(loaded, truth)
    assert len(refusals) > 0.9 * len(bits)
    assert all(str(path) in refusal for refusal in refusals)


def test_numbers_of_experts_without_end(tmp_path: Path) -> None:
    """The missing one is found without listing all that would be before the last."""
    for number, message in (("999999999", "number 1 is missing"), ("9" * 5000, "has no scales")):
        names = ["x.experts.0.w", f"x.experts.{number}.w"]
        path = tmp_path / f"{len(number)}.safetensors"
        save_file({name: torch.zeros(8, 32).to(torch.float8_e4m3fn) for name in names}, path)
        with pytest.raises(ValueError, match=message) as caught:
            checkpoint.load_experts(path, "x.experts.*.w")
        assert str(path) in str(caught.value) or "number 1" in message


# ---------------------------------------------------------------- folders and links


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with an index, of experts to convert."""
    a, b = {"a.experts.w": torch.randn(2, 8, 32).bfloat16()}, {"b.weight": torch.ones(4, 32).bfloat16()}
    made = write_folder(tmp_path / "model", {"1.safetensors": a, "2.safetensors": b}, None)
    (made / "config.json").write_text('{"model_type": "größe"}', encoding="utf-8")
    (made / "tokenizer.json").write_text("{}")
    return made


Change = Callable[[Path], object]


def content(name: str, new: object) -> Change:
    """Bytes, or what an index maps."""
    text = new if isinstance(new, bytes) else json.dumps({"weight_map": new}).encode()
    return lambda folder: (folder / name).write_bytes(text)


def instead(name: str, make: Change) -> Change:
    return lambda folder: ((folder / name).unlink(), make(folder / name))


index, config = (functools.partial(content, name) for name in (checkpoint.INDEX_FILE, "config.json"))
BOTH = b'{"weight_map": {"b.weight": "1.safetensors", "b.weight": "2.safetensors"}}'
QUANTIZED = b'{"quantization_config": {"quant_method": "fp8"}}'

FOLDERS: dict[str, tuple[Change, str]] = {
    "parent": (index({"w": "../secret.safetensors"}), "index.json: must name files of its own folder"),
    "absolute": (index({"w": "/etc/passwd"}), "index.json: must name files of its own folder"),
    "the folder itself": (index({"w": "."}), "index.json: must name files of its own folder"),
    "the folder above": (index({"w": ".."}), "index.json: names the file '..', which is not there"),
    "a zero byte": (index({"w": "1\0.safetensors"}), "index.json: names the file .*which is not there"),
    "a number": (index({"w": 1}), "index.json: must have a weight_map"),
    "one tensor twice": (index(BOTH), "index.json: is no JSON: 'b.weight' is there twice"),
    "nested without end": (index(b"[" * 100_000), "index.json: is no JSON"),
    "no UTF-8": (index(b'{"weight_map": {"\xff": "1.safetensors"}}'), "index.json: is no JSON"),
    "of another tensor": (index({"c.weight": "1.safetensors"}), "1.safetensors: has no tensor 'c.weight', which the index"),
    "no file": (lambda at: (at / "2.safetensors").unlink(), "names the file '2.safetensors', which is not there"),
    "link to itself": (instead("2.safetensors", lambda at: at.symlink_to(at)), "'2.safetensors', which is not there"),
    "a folder for a file": (instead("2.safetensors", lambda at: at.mkdir()), "'2.safetensors', which is not there"),
    "a pipe for a file": (instead("2.safetensors", os.mkfifo), "'2.safetensors', which is not there"),
    "a link to another kind of file": (instead("2.safetensors", lambda at: at.symlink_to("/etc/passwd")), "2.safetensors: is no complete"),
}  # fmt: skip

CONFIGS: dict[str, tuple[Change, str]] = {
    "config of another kind": (config(b"[]"), "config.json: must hold an object, got a list"),
    "config in another code": (config(b'{"a": "gr\xf6\xdfe"}'), "config.json: is no JSON"),
    "config quantized already": (config(QUANTIZED), r"config.json: says that the model is quantized already \('fp8'\)"),
    "config quantized somehow": (config(b'{"quantization_config": 8}'), r"is quantized already \(8\)"),
    "tokenizer that is away": (instead("tokenizer.json", lambda at: at.symlink_to("absent")), "tokenizer.json: is a link to nothing"),
    "a folder in itself": (lambda at: (at / "self").symlink_to("."), "self: is a link to a folder that it is in"),
    "a folder in a subfolder": (lambda at: ((at / "sub").mkdir(), (at / "sub" / "up").symlink_to("..")), "sub/up: is a link to a folder that it is in"),
    "a subfolder's file that is away": (lambda at: ((at / "sub").mkdir(), (at / "sub" / "file").symlink_to("absent")), "sub/file: is a link to nothing"),
}  # fmt: skip


@pytest.mark.parametrize("how", [*FOLDERS, *CONFIGS])
def test_folders_that_lie(folder: Path, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = (FOLDERS | CONFIGS)[how]
    change(folder)
    if how in FOLDERS:
        with pytest.raises(ValueError, match=message):
            checkpoint.find_experts(folder)
    assert quantize(folder, tmp_path / "out", *ALL) == 2
    said = capsys.readouterr().err
    assert str(folder) in said
    assert message.rpartition(": ")[2].split("\\")[0].split(".*")[-1] in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda at: at.symlink_to("/dev/zero")], ids=["pipe", "folder", "device"]
)
def test_what_is_no_file(make: Change, tmp_path: Path) -> None:
    """Named itself or found in a folder; a pipe that is opened would wait for ever."""
    path = tmp_path / "m.safetensors"
    make(path)
    if not path.is_dir():
        with pytest.raises(ValueError, match=r"m.safetensors: is no regular file"):
            checkpoint.load_experts(path, "w")
    with pytest.raises(ValueError, match=r"m.safetensors: is no regular file"):
        checkpoint.load_experts(tmp_path, "w")


def test_a_hubs_cache_is_links(folder: Path, tmp_path: Path) -> None:
    """Links to files under other names elsewhere: they convert as files do."""
    assert quantize(folder, tmp_path / "a", *ALL) == 0
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / f"blob {number}")
        file.symlink_to(Path("..", f"blob {number}"))
    assert quantize(folder, tmp_path / "b", *ALL) == 0
    for file in (tmp_path / "a").iterdir():
        assert not (tmp_path / "b" / file.name).is_symlink()
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    assert "größe" in json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))["model_type"]


# ---------------------------------------------------------------- what can't be written


@contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """A real limit, which the system enforces."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 7, 100, 300, 2000, 150_000])
def test_a_disk_that_fills(limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the header, a tensor, at the end: the error names the file, and nothing is left."""
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"w": torch.randn(4, 256, 64), "v": torch.randn(30_000)}, source)
    with files_up_to(limit):
        assert quantize(source, target, "--experts", "w") == 2
    assert f"quantize: [Errno 27] can't be written: File too large: '{target}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]
    w = mx.quantize_weights(torch.randn(4, 256, 64), backend="reference")
    with files_up_to(min(limit, 60_000)), pytest.raises(OSError, match=r"can't be written: .*out\.safetensors"):
        checkpoint.save_experts(target, {"w": w})
    assert list(tmp_path.iterdir()) == [source]
    assert quantize(source, target, "--experts", "w") == 0


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_at_last(step: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all is written, and the system only then says that it is not."""

    def fail(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with (
        pytest.raises(OSError, match=f"can't be written: {os.strerror(code)}: .*m.safetensors") as caught,
        SafetensorsWriter(tmp_path / "m.safetensors", [Entry("w", "U8", (4,))], {}) as opened,
    ):
        opened.append("w", torch.zeros(4, dtype=torch.uint8))
    assert caught.value.errno == code
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_read_only() -> None:
    def run(target: Path) -> tuple[int, list[str]]:
        if os.geteuid() == 0:
            os.seteuid(65534)  # whom file modes stop
        try:
            checkpoint.save_experts(target, {})
        except OSError as error:
            return error.errno or 0, [error.strerror or "", str(error.filename)]
        return 0, []

    with tempfile.TemporaryDirectory() as closed:  # not tmp_path, whose parents only their owner may enter
        Path(closed).chmod(0o555)
        target = Path(closed, "m.safetensors")
        assert Child(run, target).result() == (errno.EACCES, ["can't be written: Permission denied", str(target)])


# ---------------------------------------------------------------- runs that end early


def end_by(number: signal.Signals, call: int) -> None:
    """Send this process, which is a child, a signal after a call of ``append``."""
    append, calls = SafetensorsWriter.append, itertools.count(1)

    def last(self: SafetensorsWriter, name: str, data: torch.Tensor) -> None:
        append(self, name, data)
        if next(calls) == call:
            os.kill(os.getpid(), number)

    SafetensorsWriter.append = last  # type: ignore[method-assign]


def converting(source: Path, target: Path, *words: str, number: signal.Signals, call: int) -> int | None:
    """A conversion's exit code in a process that gets this signal; None if that killed it."""

    def run() -> int:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        end_by(number, call)
        return quantize(source, target, *ALL, *words)

    result = Child(run).result()
    assert result is None or isinstance(result, int), result
    return result


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_conversion_that_is_ended(folder: Path, call: int, tmp_path: Path) -> None:
    """By Ctrl-C, a scheduler or a terminal: all is removed; killed: the next run does it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert converting(folder, tmp_path / "out", number=number, call=call) == 130
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert converting(folder, tmp_path / "out", number=signal.SIGKILL, call=call) is None
    left = [path.name for path in tmp_path.iterdir() if path.name != "model"]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    assert quantize(folder, tmp_path / "out", *ALL) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_conversion_under_nohup_outlives_its_terminal(folder: Path, tmp_path: Path) -> None:
    def run() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        end_by(signal.SIGHUP, 2)
        return quantize(folder, tmp_path / "out", *ALL)

    assert Child(run).result() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_to_be_replaced_stays_until_then(folder: Path, number: signal.Signals, tmp_path: Path) -> None:
    for source, target in ((folder, tmp_path / "out"), (folder / "1.safetensors", tmp_path / "out.safetensors")):
        assert quantize(source, target, *ALL) == 0
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        converting(source, target, "--force", number=number, call=2)
        assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("own", [True, False], ids=["an earlier process of this number", "a process that is gone"])
def test_leftovers_are_cleared(folder: Path, own: bool, tmp_path: Path) -> None:
    """In a container the next process often has the last one's number. A living one's stay."""
    process = os.getpid() if own else Child(os.getpid).result()
    prefix = writer._prefix(tmp_path / "out")
    left = tmp_path / f"{prefix}{process}{writer.SUFFIX}"
    (left / "deep").mkdir(parents=True)
    others = [
        tmp_path / f"{prefix}{os.getppid()}{writer.SUFFIX}",
        tmp_path / f".out.another-host-{process}{writer.SUFFIX}",
        tmp_path / f".other{prefix}{process}{writer.SUFFIX}",
        tmp_path / f"{prefix}1x{writer.SUFFIX}",
    ]
    for other in others:
        other.mkdir()
    assert quantize(folder, tmp_path / "out", *ALL) == 0
    assert not left.exists()
    assert all(other.is_dir() for other in others)


def test_one_result_is_written_once_at_a_time(tmp_path: Path) -> None:
    with writer.atomic_write(tmp_path / "m") as path:
        path.touch()
        with (
            pytest.raises(ValueError, match="m: is being written by this process already"),
            writer.atomic_write(tmp_path / "m"),
        ):
            pass
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_take_its_place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was to be replaced is put back."""
    target = tmp_path / "out"
    assert quantize(folder, target, *ALL) == 0
    (target / "mine").touch()
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name.endswith(writer.SUFFIX):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    assert quantize(folder, target, *ALL, "--force") == 2
    assert (target / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_conversion_again_adds_to_the_first(folder: Path, tmp_path: Path) -> None:
    """A config of MXFP8 is no reason to refuse: its list of what is not quantized is made anew."""
    save_file({"b.experts.w": torch.ones(2, 4, 32).bfloat16()}, folder / "2.safetensors")
    weight_map = {"a.experts.w": "1.safetensors", "b.experts.w": "2.safetensors"}
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert quantize(folder, tmp_path / "first", "--experts", "a.*") == 0
    assert quantize(tmp_path / "first", tmp_path / "second", "--experts", "b.*w") == 0
    found = load_file(tmp_path / "second" / "2.safetensors")
    assert found["b.experts.w"].dtype == torch.float8_e4m3fn
    said = json.loads((tmp_path / "second" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert said == {**convert.QUANTIZATION_CONFIG, "modules_to_not_convert": []}
