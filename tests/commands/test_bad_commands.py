"""Wrong words on the command line, wrong settings, and wrong arguments for checkpoints."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.commands import cli

COMMANDS: list[tuple[str, str]] = [
    ("", r"the following arguments are required: COMMAND$"),
    ("bogus", r"argument COMMAND: invalid choice: 'bogus'"),
    ("DOCTOR", r"argument COMMAND: invalid choice: 'DOCTOR'"),
    ("--bogus", r"required: COMMAND|unrecognized arguments: --bogus"),
    ("doctor --bogus", r"unrecognized arguments: --bogus"),
    ("doctor extra", r"unrecognized arguments: extra"),
    ("demo --experts 0", r"argument --experts: invalid choice: 0"),
    ("demo --experts 7", r"argument --experts: invalid choice: 7"),
    ("demo --experts six", r"argument --experts: invalid int value: 'six'"),
    ("demo --max-rows 0", r"argument --max-rows: must be a number of at least 1, got '0'"),
    ("demo --max-rows -3", r"argument --max-rows: (must be|expected one argument)"),
    ("demo --max-rows many", r"argument --max-rows: must be a number of at least 1, got 'many'"),
    ("demo --max-rows 1.5", r"argument --max-rows: must be a number of at least 1, got '1.5'"),
    ("demo --device tpu", r"argument --device: invalid choice: 'tpu'"),
    ("quantize", r"the following arguments are required: IN, OUT, --experts"),
    ("quantize {file} {tmp}/out", r"the following arguments are required: --experts"),
    ("quantize {tmp}/none {tmp}/out --experts *", r"none: no such file or folder"),
    ("quantize {text} {tmp}/out --experts *", r"is no complete safetensors file"),
    ("quantize {file} {file} --experts *", r"IN and OUT must not be the same"),
    ("quantize {tmp} {tmp}/out --experts *", r"IN and OUT must not lie in one another"),
    ("quantize {file} {text} --experts *", r"exists; --force replaces it"),
    ("quantize {file} {pipe} --experts * --force", r"pipe: must be a file or a folder to be replaced, got a device"),
    ("quantize {file} {ring} --experts nothing*", r"--experts: no matrix matches nothing\*"),
    ("quantize {file} {tmp}/out --experts nothing*", r"--experts: no matrix matches nothing\*"),
    ("quantize {file} {tmp}/out --experts * --scale-rounding up", r"argument --scale-rounding: invalid choice: 'up'"),
    ("quantize {file} {tmp}/out --experts * --device tpu", r"argument --device: invalid choice: 'tpu'"),
    ("accuracy --plot {tmp}/x.docx --synthetic --no-transformers", r"--plot: must end in \.png, \.svg, \.pdf"),
    ("accuracy --json {tmp}/no/x.json --synthetic --no-transformers", r"there is no folder"),
    ("warmup --jobs 0", r"argument --jobs: expected a positive number, got 0"),
    ("warmup --jobs x", r"argument --jobs: expected a positive number, got x"),
    ("warmup --arch 9.0", r"argument --arch: invalid choice: '9\.0'"),
    ("warmup --configs bogus", r"argument --configs: config: expected one of"),
    ("warmup --configs 1sm_128x64x128,", r"argument --configs: config: expected one of .* got ''"),
    ("warmup --configs 1sm_128x64x128_8x8", r"argument --configs: config: expected one of"),
    ("warmup --out-dtypes int8", r"argument --out-dtypes: expected some of bf16, fp16, fp32, got int8"),
    ("bench --only bogus", r"argument --only: invalid choice: 'bogus'"),
    ("bench --budget x", r"argument --budget: must be a positive number of seconds, got 'x'"),
    ("bench --budget nan", r"argument --budget: must be a positive number of seconds, got 'nan'"),
    ("bench --budget=-1", r"argument --budget: must be a positive number of seconds, got '-1'"),
    ("bench --budget inf", r"argument --budget: must be a positive number of seconds, got 'inf'"),
    ("bench --from-json {tmp}/none", r"--from-json: .*none: .*No such file"),
    ("bench --from-json {text}", r"--from-json: .*text: Expecting value"),
    ("bench --from-json {json}", r"--from-json: .*json: must be a record of schema"),
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A checkpoint, a file of text and one of other JSON, a pipe, and a link to itself."""
    from safetensors.torch import save_file

    found = {name: tmp_path / name for name in ("file", "text", "json")}
    save_file({"experts.w": torch.ones(2, 8, 64)}, found["file"])
    found["text"].write_text("no tensors")
    found["json"].write_text(json.dumps({"a": 1}))
    found["pipe"], found["ring"] = tmp_path / "pipe", tmp_path / "ring"
    os.mkfifo(found["pipe"])
    found["ring"].symlink_to(found["ring"])
    return {**found, "tmp": tmp_path}


def run(words: Sequence[str]) -> int:
    try:
        return cli.main(words)
    except SystemExit as leaving:  # argparse's way
        code = leaving.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(("line", "message"), COMMANDS, ids=[line or "nothing" for line, _ in COMMANDS])
def test_wrong_words(line: str, message: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, the reason on stderr, no traceback and nothing written."""
    before = sorted(files["tmp"].iterdir())
    assert run([word.format(**files) for word in line.split()]) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err), said.err
    assert "Traceback" not in said.err
    assert sorted(files["tmp"].iterdir()) == before


@pytest.mark.parametrize("command", ["demo --synthetic", "quantize {file} {tmp}/out --experts *"])
def test_a_gpu_that_is_not_there(
    command: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run([*(word.format(**files) for word in command.split()), "--device", "cuda"]) == 2
    assert "device: there are 0 GPUs that this PyTorch can use, got 'cuda'" in capsys.readouterr().err


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("value", ["bogus", "cuda", "auto,triton", "0", "none"])
def test_wrong_backend_in_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function that chooses says so; a name given to the call is not affected."""
    x, counts = torch.ones(3, 32), torch.tensor([3], dtype=torch.int32)
    w = mx.quantize_weights(torch.ones(1, 8, 32), backend="reference")
    xq = mx.quantize_grouped(x, counts, backend="reference")
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    w13 = mx.quantize_weights(torch.ones(1, 64, 32), backend="reference")
    w2 = mx.quantize_weights(torch.ones(1, 32, 32), backend="reference")
    calls: list[Callable[[], Any]] = [
        lambda: mx.quantize_grouped(x, counts),
        lambda: mx.quantize_weights(torch.ones(1, 8, 32)),
        lambda: mx.grouped_gemm(xq, w),
        lambda: mx.explain(xq, w),
        lambda: mx.grouped_gemm_workspace_size(w, 3),
        lambda: mx.moe_forward(x, w13, w2, ids, weights),
        lambda: mx.MXFP8Experts(w13, w2),
        lambda: mx.MoEWorkspace(w13, w2, max_tokens=3, top_k=1),
        lambda: torch.ops.hybrid_mxfp8.quantize_weights(torch.ones(1, 8, 32), "rceil", None),
    ]
    monkeypatch.setenv("HYBRID_MXFP8_BACKEND", value)
    for call in calls:
        with pytest.raises(ValueError, match=f"^HYBRID_MXFP8_BACKEND: must be one of .* got '{value}'$"):
            call()
    assert mx.grouped_gemm(xq, w, backend="reference").shape == (3, 8)
    with mx.use_backend("reference"):
        assert mx.grouped_gemm(xq, w).shape == (3, 8)


# ---------------------------------------------------------------- checkpoints


def weights() -> mx.ExpertWeights:
    return mx.quantize_weights(torch.ones(2, 8, 64), backend="reference")


def on_meta() -> mx.ExpertWeights:
    w = weights()
    return mx.ExpertWeights(w.values.to("meta"), w.scales.to("meta"))


LOADED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("names a number", {"names": 3}, TypeError, "^names: must be a string or a sequence of strings, got 3$"),
    ("names None", {"names": None}, TypeError, "^names: must be a string or a sequence of strings, got None$"),
    ("a name a number", {"names": ["w", 3]}, TypeError, "^names: must be a string or a sequence of strings"),
    ("no names", {"names": []}, ValueError, "^names: must name at least one tensor, got none$"),
    ("unknown name", {"names": "v"}, ValueError, "has no tensor 'v'$"),
    ("two stars", {"names": "a*b*"}, ValueError, r"^names: 'a\*b\*' must have one \* at most$"),
    ("a star without numbers", {"names": "w*"}, ValueError, r"has no tensor 'w\*' with a number for the \*$"),
    ("scales as weights", {"names": "w_scale_inv"}, ValueError, "w_scale_inv: dtype must be F8_E4M3, got U8$"),
    ("no such device", {"device": "tpu0"}, ValueError, "^device: must be a torch.device or the name of one, got 'tpu0'$"),
    ("no such GPU", {"device": "cuda:63"}, ValueError, "^device: there are .* got 'cuda:63'$"),
    ("no such GPU, nor a file", {"device": "cuda:63", "path": "/nowhere"}, ValueError, "^device: there are .* got 'cuda:63'$"),
    ("a device a number", {"device": 1.5}, ValueError, "^device: must be a torch.device"),
    ("experts beyond", {"experts": range(1, 4)}, ValueError, r"^experts: must be numbers of 0 \.\. 1, at least one, got range\(1, 4\)$"),
    ("experts before", {"experts": range(-1, 2)}, ValueError, r"^experts: must be numbers of 0 \.\. 1, .* got range\(-1, 2\)$"),
    ("no experts", {"experts": range(2, 2)}, ValueError, r"^experts: must be numbers of 0 \.\. 1, at least one, got range\(2, 2\)$"),
    ("experts as a list", {"experts": [0, 1]}, TypeError, "^experts: must be a range of experts' numbers, got list$"),
    ("no such file", {"path": "/nowhere/at/all"}, FileNotFoundError, "no such file or folder"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "changes", "error", "message"), LOADED, ids=[row[0] for row in LOADED])
def test_load_experts(what: str, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    checkpoint.save_experts(path, {"w": weights()})
    with pytest.raises(error, match=message):
        checkpoint.load_experts(**{"path": path, "names": "w", **changes})


SAVED: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("a list", lambda: [weights()], TypeError, "^experts: must map names to ExpertWeights, got list$"),
    ("one operand", weights, TypeError, "^experts: must map names to ExpertWeights, got ExpertWeights$"),
    ("tensors", lambda: {"w": torch.ones(3)}, TypeError, "^experts: must map names to ExpertWeights, got 'w': Tensor$"),
    ("a number for a name", lambda: {3: weights()}, TypeError, "^experts: must map names to ExpertWeights, got 3"),
    ("an empty name", lambda: {"": weights()}, ValueError, "^experts: a tensor can't be called ''"),
    ("the header's name", lambda: {"__metadata__": weights()}, ValueError, "^experts: a tensor can't be called '__metadata__'"),
    ("one name twice", lambda: {"w": weights(), "w_scale_inv": weights()}, ValueError, "'w_scale_inv' is there twice"),
    ("no data", lambda: {"w": on_meta()}, ValueError, "^experts: 'w' must have data, got tensors on meta$"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "experts", "error", "message"), SAVED, ids=[row[0] for row in SAVED])
def test_save_experts(
    what: str, experts: Callable[[], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    """Refused before anything is written."""
    with pytest.raises(error, match=message):
        checkpoint.save_experts(tmp_path / "experts.safetensors", experts())
    assert not list(tmp_path.iterdir())
