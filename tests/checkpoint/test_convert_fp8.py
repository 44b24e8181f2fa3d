"""FP8 with a scale for each block of 128x128, as DeepSeek-V3 publishes it, to MXFP8: tensors,
files, folders.

Models with such experts are in test_transformers.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from files import FP8, Tensors, convert_tensors, quantize, read_folder, same_bytes, same_experts, write_folder
from safetensors.torch import load_file

import hybrid_mxfp8 as mx
from hybrid_mxfp8 import reference
from hybrid_mxfp8.checkpoint import convert, fp8_blocks
from hybrid_mxfp8.checkpoint import reader as checkpoint
from hybrid_mxfp8.core.scales import dequantize

E8M0 = torch.float8_e8m0fnu
EXPERT, OTHER = "model.layers.3.mlp.experts.0.up_proj.weight", "model.layers.3.self_attn.o_proj.weight"
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def random_fp8(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Elements of all magnitudes, zeros and the largest among them."""
    bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    bits[(bits & 0x7F) == 0x7F] = 0x7E
    return bits.view(FP8)


def random_scales(rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One a block, of a weight's 448ths; powers of two if ``dtype`` holds nothing else."""
    *stack, n, k = shape
    exact = torch.rand((*stack, -(-n // 128), -(-k // 128)), generator=rng) * 0.01 + 1e-4
    return exact.log2().round().exp2().to(dtype) if dtype == E8M0 else exact.to(dtype)


def truth(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """By the Kronecker product of the scales with a block of ones, instead of by repetition."""
    spread = torch.kron(scales.float(), torch.ones(128, 128, device=scales.device))
    n, k = values.shape[-2:]
    return values.float() * spread[..., :n, :k]


def assert_mxfp8(found: Tensors, name: str, exact: torch.Tensor, rounding: str = "rceil") -> None:
    values, scales = reference.quantize(exact, rounding)
    assert same_bytes(found[name], values)
    assert same_bytes(found[name + "_scale_inv"], scales)


def converted(tensors: Tensors, folder: Path, *words: str) -> Tensors:
    assert convert_tensors(tensors, folder, "--experts", "w", *words) == 0
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("rounding", ["rceil", "floor", "even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, E8M0], ids=["fp32", "bf16", "E8M0"])
@pytest.mark.parametrize("shape", [(3, 200, 288), (1, 128, 128), (2, 8, 32), (2, 257, 160)], ids=str)
def test_a_weight_becomes_what_its_elements_and_scales_stand_for(
    shape: tuple[int, ...], dtype: torch.dtype, rounding: str, rng: torch.Generator, tmp_path: Path
) -> None:
    """As tensors, and as a file of stacked experts."""
    values, scales = random_fp8(rng, *shape), random_scales(rng, shape, dtype)
    exact = truth(values, scales)
    wq = fp8_blocks.quantize_fp8_blocks(torch.nn.Parameter(values), scales, scale_rounding=rounding)
    assert same_experts(wq, mx.quantize_weights(exact, scale_rounding=rounding))
    assert not wq.values.requires_grad
    found = converted({"w": values, "w_scale_inv": scales}, tmp_path, "--scale-rounding", rounding)
    assert found.keys() == {"w", "w_scale_inv"}
    assert_mxfp8(found, "w", exact, rounding)


def test_on_each_backend_and_device(backend: str, device: str, rng: torch.Generator) -> None:
    values, scales = random_fp8(rng, 2, 136, 160).to(device), random_scales(rng, (2, 136, 160)).to(device)
    wq = fp8_blocks.quantize_fp8_blocks(values, scales, backend=backend)
    assert same_experts(wq, fp8_blocks.quantize_fp8_blocks(values, scales, backend="reference"))
    powers = random_scales(rng, (2, 136, 160), E8M0).to(device)
    of_128 = fp8_blocks.quantize_fp8_blocks(values, powers, scale_group=128, backend=backend)
    assert of_128.scale_group == 128
    assert same_bytes(of_128.scales, mx.quantize_weights(truth(values, powers), scale_group=128).scales)
    assert torch.equal(of_128.dequantize(), truth(values, powers))
    on_meta = fp8_blocks.quantize_fp8_blocks(values, scales, device=torch.device("meta"))
    assert on_meta.values.is_meta
    assert (on_meta.num_experts, on_meta.n, on_meta.k) == (2, 136, 160)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(2, 136, 160)}, TypeError, "^values: dtype must be float8_e4m3fn, got float32$"),
        ({"values": torch.zeros(136, 160).to(FP8)}, ValueError, r"^values: must have shape \(E, N, K\)"),
        ({"values": torch.zeros(2, 136, 100).to(FP8)}, ValueError, "^values: K must be a positive multiple of 32"),
        ({"scales": torch.ones(2, 2, 2, dtype=torch.uint8)}, TypeError, "^scales: dtype must be float32 or bfloat16"),
        ({"scales": torch.ones(2, 136, 5)}, ValueError, r"^scales: must have shape \(E, ceil\(N/128\), ceil\(K/128\)\) = \(2, 2, 2\)"),
        ({"scales": torch.ones(2, 2, 2, device="meta")}, ValueError, "^scales: must be on cpu"),
        ({"scale_rounding": "up"}, ValueError, "^scale_rounding: "),
        ({"device": "gpu"}, ValueError, "^device: must be a torch.device or the name of one, got 'gpu'$"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values, scales = torch.ones(2, 136, 160).to(FP8), torch.ones(2, 2, 2)
    with pytest.raises(error, match=message):
        fp8_blocks.quantize_fp8_blocks(**{"values": values, "scales": scales, **change})


@pytest.mark.parametrize("elements", [1, 128 * 288, 200 * 288, 2**22], ids=lambda e: f"{e} elements")
def test_blocks_of_rows_do_not_show(
    elements: int, rng: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read in multiples of 128, so each part begins where a scale does."""
    monkeypatch.setattr(convert, "BLOCK_ELEMENTS", elements)
    values, scales = random_fp8(rng, 2, 600, 288), random_scales(rng, (2, 600, 288))
    found = converted({"w": values, "w_scale": scales}, tmp_path)
    assert found.keys() == {"w", "w_scale_inv"}  # read under either name, written under one
    assert_mxfp8(found, "w", truth(values, scales))


def test_powers_of_two_lose_nothing(rng: torch.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in DeepSeek-V3.1: every code, at all exponents that a weight's scale may have."""
    values = random_fp8(rng, 512, 256)
    scales = torch.tensor([[2.0**-100, 2.0**-13], [1.0, 2.0**90], [2.0**-5, 2.0**-6], [2.0**-7, 2.0**-8]])
    found = converted({"w": values, "w_scale_inv": scales}, tmp_path)
    said, before, after = capsys.readouterr().out, 512 * 256 + 4 * 8, 512 * 256 * 33 // 32
    assert f"1 expert tensor to MXFP8, {before / 1024:.2f} KiB -> {after / 1024:.2f} KiB (1.03x)" in said
    assert "no matrix lost anything" in said
    assert torch.equal(dequantize(found["w"], found["w_scale_inv"]), truth(values, scales))


def test_what_is_no_matrix_stays_with_its_scales(tmp_path: Path) -> None:
    """Tensors of four dimensions, empty ones, and biases that match."""
    names = {"four": (1, 2, 128, 32), "empty": (0, 32), "experts.bias": (2, 32), "w": (2, 32)}
    tensors = {name: torch.ones(shape).to(FP8) for name, shape in names.items()}
    tensors |= {name + "_scale_inv": torch.ones(*shape[:-2], -(-shape[-2] // 128), 1) for name, shape in names.items()}
    found = converted(tensors, tmp_path, "--experts", "experts.*", "--others-to-bf16")
    for name in ("four", "four_scale_inv", "empty", "empty_scale_inv"):
        assert same_bytes(found[name], tensors[name])
    assert found["experts.bias"].dtype == torch.bfloat16
    assert "experts.bias_scale_inv" not in found
    assert found["w_scale_inv"].dtype == torch.uint8


@pytest.fixture
def tensors(rng: torch.Generator) -> Tensors:
    head = torch.randn(8, 256, generator=rng).bfloat16()
    found: Tensors = {"model.norm.weight": torch.ones(256), "lm_head.weight": head}
    for name in (EXPERT, OTHER):
        found |= {name: random_fp8(rng, 200, 256), name + "_scale_inv": random_scales(rng, (200, 256))}
    return found


def in_two_files(path: Path, tensors: Tensors, config: object) -> Path:
    """The first has weights and the second their scales."""
    first = {name: t for name, t in tensors.items() if name in (EXPERT, OTHER + "_scale_inv")}
    second = {name: t for name, t in tensors.items() if name not in first}
    return write_folder(path, {"a.safetensors": first, "b.safetensors": second}, config)


@pytest.fixture
def folder(tensors: Tensors, tmp_path: Path) -> Path:
    return in_two_files(tmp_path / "model", tensors, {"hidden_size": 256, "quantization_config": FP8_CONFIG})


def test_scales_in_another_file_are_found_and_left_out(folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    assert quantize(folder, tmp_path / "out", "--experts", "*.experts.*", "--experts", "*_proj.weight") == 0
    files, config = read_folder(tmp_path / "out")
    assert files["a.safetensors"].keys() == {EXPERT, EXPERT + "_scale_inv"}
    assert files["b.safetensors"].keys() == {OTHER, OTHER + "_scale_inv", "model.norm.weight", "lm_head.weight"}
    found = {**files["a.safetensors"], **files["b.safetensors"]}
    for name in (EXPERT, OTHER):
        assert_mxfp8(found, name, truth(tensors[name], tensors[name + "_scale_inv"]))
    expected = {**convert.QUANTIZATION_CONFIG, "modules_to_not_convert": ["lm_head"]}
    assert config == {"hidden_size": 256, "quantization_config": expected}


CONFIGS: dict[str, object] = {
    "of the model": {"quantization_config": FP8_CONFIG},
    "of a part": {"text_config": {"quantization_config": FP8_CONFIG}},
    "of a part's part": {"thinker_config": {"text_config": {"quantization_config": FP8_CONFIG}}},
    "of compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
    "in another file": {},
}  # fmt: skip


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "scale"])
def test_one_format_is_said_in_one_place(
    how: str, scale: str, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FP8 beside MXFP8 is refused; with the others as bf16 nothing says FP8 any more."""
    renamed = {name.replace("weight_scale_inv", scale): t for name, t in tensors.items()}
    folder = in_two_files(tmp_path / "model", renamed, CONFIGS[how])
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert quantize(folder, tmp_path / "out", "--experts", "*.experts.*") == 2
    said = capsys.readouterr().err
    assert f"config.json: can't say beside MXFP8 that weights are FP8, and 1 would stay so, {OTHER} first" in said
    assert "give --others-to-bf16" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert quantize(folder, tmp_path / "out", "--experts", "*.experts.*", "--others-to-bf16") == 0
    assert f"other FP8 tensors written as bf16: 1, {OTHER} among them" in capsys.readouterr().out
    files, config = read_folder(tmp_path / "out")
    found = {name: t for file in files.values() for name, t in file.items()}
    assert found.keys() == tensors.keys() - {OTHER + "_scale_inv"}
    assert_mxfp8(found, EXPERT, truth(tensors[EXPERT], tensors[EXPERT + "_scale_inv"]))
    assert torch.equal(found[OTHER], truth(tensors[OTHER], tensors[OTHER + "_scale_inv"]).bfloat16())
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head", OTHER.removesuffix(".weight")]
    assert "fp8" not in (tmp_path / "out" / "config.json").read_text().replace("mxfp8", "")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_packed_weights_beside_fp8_are_refused(
    file: str, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As compressed-tensors mixes formats: the entry replaced said how to read them."""
    packed = {"lm_head.weight_packed": torch.ones(8, 16, dtype=torch.int32)}
    folder = in_two_files(tmp_path / "model", tensors | packed, {})
    (folder / file).write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    assert quantize(folder, tmp_path / "out", "--experts", "*.experts.*", "--others-to-bf16") == 2
    method = "compressed-tensors" if file == "config.json" else "hf_quant_config"
    assert f"/{file}: says that the model is quantized already ('{method}')" in capsys.readouterr().err


def test_a_folder_without_configuration_keeps_other_fp8(folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    """Byte for byte, scales included: for a loader that knows what is what."""
    (folder / "config.json").unlink()
    assert quantize(folder, tmp_path / "out", "--experts", "*.experts.*") == 0
    found = {**load_file(tmp_path / "out" / "a.safetensors"), **load_file(tmp_path / "out" / "b.safetensors")}
    assert found.keys() == tensors.keys()
    assert all(same_bytes(found[name], tensors[name]) for name in (OTHER, OTHER + "_scale_inv"))


def test_progress_is_told_in_bytes_of_the_source(folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    told: list[int] = []
    options = convert.Options(("*.experts.*",), others_to_bf16=True)
    with checkpoint.Checkpoint(folder) as opened:
        planned = convert.plan(opened, options)
        convert.convert(opened, planned, tmp_path / "out", options, lambda _, size: told.append(size))
    assert sum(told) == sum(tensor.entry.num_bytes for tensor in planned) == sum(t.nbytes for t in tensors.values())
