"""The emulator itself: its parser, its numbers, its memory and its races, on programs of a few
lines. No compiler, no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx import product, tensormap
from ptx.case import swizzled
from ptx.errors import Fault, Hang, UnknownInstruction
from ptx.formats import E4M3, bf16_bits, e4m3_bits
from ptx.hopper_programs import INIT, Hopper, kernel, programs
from ptx.on_hopper import emulated
from ptx.parser import parse

PROGRAMS = programs()


def run(body: str, **more: int) -> np.ndarray:
    """The output of a kernel's body, as words."""
    return emulated(Hopper("test", kernel(body), 256, 256, **more)).view(np.uint32)


STORE = """
    shl.b32 %r60, %t, 2;
    cvt.u64.u32 %d30, %r60;
    add.u64 %d31, %out, %d30;
    st.global.u32 [%d31], %r0;
"""


@pytest.mark.parametrize("program", PROGRAMS, ids=[p.name for p in PROGRAMS])
def test_programs_for_hopper_break_no_rule(program: Hopper) -> None:
    emulated(program)


def test_registers_and_labels_of_inline_assembly_are_its_own() -> None:
    text = kernel(
        "    mov.u32 %r0, 1;\n    { .reg .b32 %r0; mov.u32 %r0, 2; bra over;\nover: }\n    { bra over;\nover: }\n"
    )
    (made,) = parse(text).values()
    first, second = (i for i in made.code if i.parts[0] == "bra")
    assert first.target < second.target
    assert run("    mov.u32 %r0, 1;\n    { .reg .b32 %r0; mov.u32 %r0, 2; }\n" + STORE)[0] == 1


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(UnknownInstruction, match=r"wgmma\.fence\.sync\.aligned is not implemented"):
        run("    wgmma.fence.sync.aligned;\n")


@pytest.mark.parametrize("lanes", [0, 1])
def test_what_a_false_guard_leaves_is_nothing_to_rely_on(lanes: int) -> None:
    assert run(f"    setp.lt.u32 %p1, %t, {lanes};\n    @%p1 mov.u32 %r0, 0;\n" + STORE)[5] == 0xA5A5A5A5
    with pytest.raises(Fault, match="read before anything is written"):
        run(STORE)


def test_lanes_that_diverge_meet_again() -> None:
    body = """
    mov.u32 %r0, 5;
    setp.lt.u32 %p1, %t, 7;
    @%p1 bra low;
    mov.u32 %r0, 9;
low:
    bar.warp.sync -1;
"""
    assert run(body + STORE)[:32].tolist() == [5] * 7 + [9] * 25


def test_a_warp_barrier_that_some_lanes_never_reach() -> None:
    with pytest.raises(Fault, match=r"bar\.warp\.sync: expected the lanes 0xffffffff"):
        run("    setp.eq.u32 %p1, %t, 0;\n    @%p1 ret;\n    bar.warp.sync -1;\n")


def test_a_hang_says_where_each_warp_waits() -> None:
    body = INIT.format(count=2) + "    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 0, 1000;\n"
    with pytest.raises(Hang, match=r"mbarrier at 0xa400: 2 arrivals and 0 bytes outstanding"):
        run(body)


LANES_EXCHANGE = """
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %smem, %r1;
    st.shared.u32 [%r2], %t;
    {between}
    xor.b32 %r3, %r1, 4;
    add.u32 %r4, %smem, %r3;
    ld.shared.u32 %r0, [%r4];
"""


def test_lanes_see_one_another_after_a_barrier_alone() -> None:
    assert run(LANES_EXCHANGE.format(between="bar.warp.sync -1;") + STORE)[:4].tolist() == [1, 0, 3, 2]
    with pytest.raises(Fault, match="race in shared memory"):
        run(LANES_EXCHANGE.format(between="") + STORE)


def test_warps_see_one_another_after_the_ctas_barrier() -> None:
    body = LANES_EXCHANGE.replace("xor.b32 %r3, %r1, 4", "xor.b32 %r3, %r1, 128")
    assert run(body.format(between="bar.sync 0;") + STORE, threads=64)[:2].tolist() == [32, 33]
    with pytest.raises(Fault, match=r"race in shared memory|nobody wrote"):
        run(body.format(between="bar.warp.sync -1;") + STORE, threads=64)


def test_memory_outside_of_the_buffers_and_memory_nobody_wrote() -> None:
    with pytest.raises(Fault, match="in no buffer of the call, 0 bytes from the end of out"):
        run("    st.global.u32 [%out + 256], %t;\n")
    with pytest.raises(Fault, match="writes in, which the call only reads"):
        run("    st.global.u32 [%in], %t;\n")
    with pytest.raises(Fault, match="reads shared memory that nobody wrote"):
        run("    ld.shared.u32 %r0, [%smem];\n")


def test_tma_reads_generic_writes_after_a_proxy_fence_alone() -> None:
    (store,) = (p for p in PROGRAMS if p.name == "TMA store, swizzle 3 at (16, 3)")
    without = Hopper(
        store.name, store.text.replace("fence.proxy.async.shared::cta;", ""), store.output, store.input, store.maps
    )
    with pytest.raises(Fault, match=r"no fence\.proxy\.async in between"):
        emulated(without)


def test_a_dependent_grid_that_does_not_wait() -> None:
    (both,) = (p for p in PROGRAMS if p.name == "griddepcontrol")
    hasty = Hopper(both.name, both.text, both.output, second=both.second.replace("griddepcontrol.wait;", ""))
    with pytest.raises(Fault, match=r"race in out: .* reads what the first kernel writes"):
        emulated(hasty)


def test_a_map_that_was_rewritten_must_be_acquired() -> None:
    (replaced,) = (p for p in PROGRAMS if p.name == "tensormap.replace")
    text = replaced.text.replace("fence.proxy.tensormap::generic.acquire.gpu [%d6], 128;", "")
    with pytest.raises(Fault, match="version 1 was written and version 0 acquired"):
        emulated(Hopper(replaced.name, text, replaced.output, replaced.input, replaced.maps))


def test_tensor_maps_leave_the_bit_that_hosts_clear() -> None:
    raw = tensormap.encode(1 << 40, 0, (1 << 31, 1 << 31), (1 << 39,), (128, 256), 3)
    assert not int(raw[8:16].view(np.uint64)[0]) >> 21 & 1
    assert tensormap.decode(raw.tobytes()).dims == (1 << 31, 1 << 31)


def test_conversions_round_to_nearest_even() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-12, 20).repeat(128)
    ours = e4m3_bits(values.clamp(-448, 448).numpy())
    assert (ours == values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()).all()
    assert (bf16_bits(values.numpy()).view(np.int16) == values.to(torch.bfloat16).view(torch.int16).numpy()).all()
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(E4M3, codes)


def test_scales_are_swizzled_as_the_product_swizzles_them() -> None:
    scales = np.random.default_rng(1).integers(0, 255, (200, 11), dtype=np.uint8)
    theirs = product.mx.swizzle_scales(torch.from_numpy(scales)).reshape(-1).numpy()
    assert (swizzled(scales, 256) == theirs).all()
