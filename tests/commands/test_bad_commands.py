"""Wrong words on the command line, and wrong settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_mxfp8 as mx
from hybrid_mxfp8.commands import cli

COMMANDS: list[tuple[str, str]] = [
    ("", r"the following arguments are required: COMMAND$"),
    ("bogus", r"argument COMMAND: invalid choice: 'bogus'"),
    ("--bogus", r"required: COMMAND|unrecognized arguments: --bogus"),
    ("doctor --bogus", r"unrecognized arguments: --bogus"),
    ("demo --experts 0", r"argument --experts: invalid choice: 0"),
    ("demo --experts 7", r"argument --experts: invalid choice: 7"),
    ("demo --max-rows 0", r"argument --max-rows: must be a number of at least 1, got '0'"),
    ("demo --max-rows many", r"argument --max-rows: must be a number of at least 1, got 'many'"),
    ("demo --device tpu", r"argument --device: invalid choice: 'tpu'"),
    ("quantize", r"the following arguments are required: IN, OUT, --experts"),
    ("quantize {tmp}/none {tmp}/out --experts *", r"none: no such file or folder"),
    ("accuracy --plot {tmp}/x.docx --synthetic --no-transformers", r"--plot: must end in \.png, \.svg, \.pdf"),
    ("accuracy --json {tmp}/no/x.json --synthetic --no-transformers", r"there is no folder"),
    ("warmup --jobs 0", r"argument --jobs: expected a positive number, got 0"),
    ("warmup --jobs x", r"argument --jobs: expected a positive number, got x"),
    ("warmup --arch 9.0", r"argument --arch: invalid choice: '9\.0'"),
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
    """A checkpoint, a file of text and one of other JSON."""
    from safetensors.torch import save_file

    found = {name: tmp_path / name for name in ("file", "text", "json")}
    save_file({"experts.w": torch.ones(2, 8, 64)}, found["file"])
    found["text"].write_text("no tensors")
    found["json"].write_text(json.dumps({"a": 1}))
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
def test_wrong_backend_in_the_environment(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every function that chooses says so; a name given to the call is not affected."""
    x, counts = torch.ones(3, 32), torch.tensor([3], dtype=torch.int32)
    xq = mx.quantize_grouped(x, counts, backend="reference")
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    w, w13, w2 = (mx.quantize_weights(torch.ones(1, n, 32), backend="reference") for n in (8, 64, 32))
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
    assert run(["demo"]) == 2
    said = capsys.readouterr().err
    assert said == f"HYBRID_MXFP8_BACKEND: must be one of auto, cutlass, triton, reference, got '{value}'\n"
    assert mx.grouped_gemm(xq, w, backend="reference").shape == (3, 8)
    with mx.use_backend("reference"):
        assert mx.grouped_gemm(xq, w).shape == (3, 8)
