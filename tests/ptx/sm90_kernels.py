"""The product's quantizer and router, compiled for sm_90, in the emulator and against their PyTorch
references.

A case makes tensors, calls the product's launcher and the reference on equal inputs, and says which
tensors must then be equal, byte by byte. On a Hopper GPU on_hopper.py makes the same calls for
real.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ptx import product
from ptx.cutlass_backend import Result
from ptx.memory import GlobalMemory, aligned
from ptx.races import Races
from ptx.triton_launch import capture


@dataclass
class Kernels:
    """A call of the product's kernels.

    Attributes:
        steps: of the tensors: a function that makes launches of buffers, and the tensors that it
            wants.
        inputs: tensors that are read.
        outputs: tensors that are written.
        expected: what the reference writes to them; an output may be longer.
    """

    steps: Callable[[dict[str, torch.Tensor]], tuple[Any, ...]]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor] = field(default_factory=dict)

    def call(self, tensors: dict[str, torch.Tensor]) -> None:
        """On a GPU's tensors."""
        product.launches.launch(*self.steps(tensors))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def quantize_rows(rounding: str, dtype: torch.dtype = torch.bfloat16, scale_group: int = 32) -> Kernels:
    """quantize_grouped of rows with a wide range of magnitudes, an empty expert among them."""
    counts, k = (3, 0, 70, 1), 352
    tokens = torch.tensor(counts, dtype=torch.int32)
    rows = sum(counts)
    spread = torch.exp2(torch.randint(-20, 20, (rows, k // 32, 1), generator=_generator()).float())
    x = (torch.randn(rows, k // 32, 32, generator=_generator()) * spread).reshape(rows, k).to(dtype)
    _, offsets, scale_offsets = product.group_offsets(tokens, rows, from_ends=False)
    scale_rows, columns = (rows + 127 * len(counts)) // 128 * 128, -(-k // 32 // 4) * 4

    def steps(t: dict[str, torch.Tensor]) -> tuple[Any, ...]:
        groups = product.GroupLayout(t["tokens"], t["offsets"], t["scale_offsets"], rows)
        values = t["values"].view(torch.float8_e4m3fn)
        options = {"rounding": rounding, "scale_group": scale_group}
        return product.launches.quantize_steps(t["x"], groups, values, t["scales"], **options)

    groups = product.GroupLayout(tokens, offsets, scale_offsets, rows)
    options = {"scale_rounding": rounding, "scale_group": scale_group}
    truth = product.mx.quantize_grouped(x, groups, **options, backend="reference")
    used = int(scale_offsets[-1])
    return Kernels(
        steps,
        {"x": x, "tokens": tokens, "offsets": offsets, "scale_offsets": scale_offsets},
        {
            "values": torch.zeros(rows, k, dtype=torch.uint8),
            "scales": torch.zeros(scale_rows, columns, dtype=torch.uint8),
        },
        {"values": truth.values.view(torch.uint8), "scales": truth.scales[:used]},
    )


def tokens_of_a_layer(tokens: int, top_k: int, experts: int, k: int = 352) -> Kernels:
    """Tokens quantized to the rows of their choices, some of which are dropped."""
    ids = torch.randint(-1, experts, (tokens, top_k), generator=_generator(), dtype=torch.int32)
    x, rows = torch.randn(tokens, k, generator=_generator()).bfloat16(), tokens * top_k
    inverse, layout = torch.zeros_like(ids), torch.zeros(3 * experts + 2, dtype=torch.int32)
    product.reference.route(ids, experts, inverse, layout)
    groups = product.GroupLayout.from_buffer(layout, experts, rows)
    sources = product.reference.source_rows(inverse, rows).int()
    truth = product.mx.quantize_grouped(x, groups, row_index=sources, scale_group=128, backend="reference")
    owned, used = int(groups.expert_offsets[-1]), int(groups.scale_offsets[-1])

    def steps(t: dict[str, torch.Tensor]) -> tuple[Any, ...]:
        groups = product.GroupLayout.from_buffer(t["layout"], experts, rows)
        values, choices = t["values"].view(torch.float8_e4m3fn), (t["inverse"], t["ids"])
        return product.launches.quantize_steps(t["x"], groups, values, t["scales"], scale_group=128, choices=choices)

    return Kernels(
        steps,
        {"x": x, "ids": ids, "inverse": inverse, "layout": layout},
        {"values": torch.zeros(rows, k, dtype=torch.uint8), "scales": torch.zeros_like(truth.scales)},
        {"values": truth.values[:owned].view(torch.uint8), "scales": truth.scales[:used]},
    )


def group_offsets(from_ends: bool) -> Kernels:
    """The layout of a batch from counts or inclusive ends."""
    values = torch.tensor([3, 0, 130, 64], dtype=torch.int32)
    given = torch.cumsum(values, 0, dtype=torch.int32) if from_ends else values
    buffer = torch.zeros(3 * 4 + 2, dtype=torch.int32)

    def steps(t: dict[str, torch.Tensor]) -> tuple[Any, ...]:
        made = product.group_layout.group_offsets
        return lambda given, layout: made(given, layout, 200, from_ends), t["given"], t["layout"]

    truth = torch.cat(product.group_offsets(given, 200, from_ends))
    return Kernels(steps, {"given": given}, {"layout": buffer}, {"layout": truth})


def route(tokens: int, top_k: int, experts: int) -> Kernels:
    """Slots sorted by expert, some of them dropped; three launches where there are many."""
    ids = torch.randint(-1, experts, (tokens, top_k), generator=_generator(), dtype=torch.int32)
    slots = tokens * top_k
    scratch = product.route.scratch_elements(slots, experts)
    outputs = {
        "inverse_permutation": torch.zeros(tokens, top_k, dtype=torch.int32),
        "layout": torch.zeros(3 * experts + 2, dtype=torch.int32),
    }
    expected = {name: torch.zeros_like(tensor) for name, tensor in outputs.items()}
    product.reference.route(ids, experts, *expected.values())
    outputs["scratch"] = torch.zeros(max(scratch, 4), dtype=torch.int32)

    def steps(t: dict[str, torch.Tensor]) -> tuple[Any, ...]:
        return lambda *buffers: product.route.route(*buffers, experts), t["ids"], *(t[name] for name in outputs)

    return Kernels(steps, {"ids": ids}, outputs, expected)


CASES: dict[str, Callable[[], Kernels]] = {
    "quantize_grouped, rceil": lambda: quantize_rows("rceil"),
    "quantize_grouped, floor": lambda: quantize_rows("floor"),
    "quantize_grouped, even, fp32": lambda: quantize_rows("even", torch.float32),
    "quantize_grouped, rceil, groups of 128": lambda: quantize_rows("rceil", scale_group=128),
    "tokens of a layer, one choice a program": lambda: tokens_of_a_layer(9, 2, 5),
    "tokens of a layer, all choices": lambda: tokens_of_a_layer(100, 4, 5),
    "group_offsets of counts": lambda: group_offsets(False),
    "group_offsets of ends": lambda: group_offsets(True),
    "route, one launch": lambda: route(17, 2, 5),
    "route, three launches": lambda: route(2100, 2, 20),
}


def emulated(kernels: Kernels, edit: Callable[[str], str] = str) -> tuple[dict[str, torch.Tensor], list[str], int]:
    """The outputs after the launches, the races found, and the instructions run.

    A launch after the first starts as early as it may: before it waits, nothing is there of what
    the one before wrote. ``edit`` changes the PTX.
    """
    memory = GlobalMemory()
    tensors = {}
    for name, tensor in (kernels.inputs | kernels.outputs).items():
        data = aligned(tensor.numel() * tensor.element_size())
        tensors[name] = torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)
        tensors[name].copy_(tensor)
        memory.add(name, data, written=name in kernels.inputs, writable=name in kernels.outputs)
    races: list[str] = []
    instructions = 0
    before = None
    for captured in capture(90, *kernels.steps(tensors)):
        found = Races()
        predecessor = {}
        contents = memory.snapshot()
        if before is None:
            memory.begin(found)
        else:
            agent = found.agents()
            memory.withhold(before, found, found.event(agent, 1, "the kernel before"))
            predecessor = {agent: 1}
        launch = captured.launch(memory, edit=edit, races=found, predecessor=predecessor, seed=5)
        before = contents
        launch.run()
        memory.show_hidden()
        races += [str(race) for race in found.found.values()]
        instructions += launch.instructions
    return {name: tensors[name] for name in kernels.outputs}, races, instructions


def differences(outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Tensors that are not what they should be; an output may be longer."""
    problems = []
    for name, truth in expected.items():
        got = outputs[name].reshape(-1)[: truth.numel()].view(truth.dtype)
        wrong = int((got.view(torch.uint8) != truth.reshape(-1).view(torch.uint8)).sum())
        if wrong:
            problems.append(
                f"{name}: {wrong} of {truth.numel() * truth.element_size()} bytes differ from the reference"
            )
    return problems


def run(make: Callable[[], Kernels]) -> Result:
    """One case in the emulator."""
    kernels = make()
    outputs, races, instructions = emulated(kernels)
    return Result(0.0, differences(outputs, kernels.expected), races, instructions)
