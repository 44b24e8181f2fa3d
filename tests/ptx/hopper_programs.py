"""Small PTX programs for sm_90, one for each thing that the emulator and a Hopper GPU must agree
on, byte by byte.

A program has one kernel (or two, the second launched programmatically), which writes an output
buffer. Inputs are bytes from a seed; tensor maps describe the input or the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

HEADER = ".version 8.3\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n"

WAIT = """{{
    .reg .pred done;
again:
    mbarrier.try_wait.parity.shared::cta.b64 done, [{barrier}], {parity};
    @done bra.uni finished;
    bra.uni again;
finished:
}}"""


@dataclass(frozen=True)
class Map:
    """A tensor map; parameters of cuTensorMapEncodeTiled, dimension 0 first."""

    of: str
    type: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0


@dataclass(frozen=True)
class Hopper:
    """A program and its launch. The kernel takes the output, the input and the maps, in this
    order."""

    name: str
    text: str
    output: int
    input: int = 16
    maps: tuple[Map, ...] = ()
    threads: int = 32
    cluster: int = 1
    grid: int = 1
    shared: int = 48 * 1024
    second: str = ""
    """Text of a kernel that is launched programmatically behind the first."""
    extra: dict[str, int] = field(default_factory=dict)

    def data(self) -> np.ndarray:
        """The input."""
        return np.random.default_rng(len(self.name)).integers(0, 256, self.input, dtype=np.uint8)


def kernel(body: str, maps: int = 0) -> str:
    """A kernel with its parameters read: %out, %in (global) and %map0.. (generic)."""
    parameters = [".param .u64 p_out", ".param .u64 p_in"]
    parameters += [f".param .align 64 .b8 p_map{i}[128]" for i in range(maps)]
    reads = "".join(
        f"    .reg .b64 %map{i};\n    mov.b64 %map{i}, p_map{i};\n    cvta.param.u64 %map{i}, %map{i};\n"
        for i in range(maps)
    )
    return f"""{HEADER}
.visible .entry program({", ".join(parameters)})
{{
    .reg .pred %p<32>;
    .reg .b16 %h<16>;
    .reg .b32 %r<64>;
    .reg .b64 %d<32>;
    .reg .b64 %out, %in;
    .reg .b32 %t, %smem, %bar;
    ld.param.u64 %out, [p_out];
    ld.param.u64 %in, [p_in];
    cvta.to.global.u64 %out, %out;
    cvta.to.global.u64 %in, %in;
{reads}    mov.u32 %t, %tid.x;
    mov.u32 %smem, smem;
    add.u32 %bar, %smem, 40960;
{body}
    ret;
}}
"""


INIT = """
    setp.ne.u32 %p0, %t, 0;
    @%p0 bra ready;
    mbarrier.init.shared::cta.b64 [%bar], {count};
    fence.mbarrier_init.release.cluster;
    fence.proxy.async;
ready:
    bar.sync 0;
"""


def copy_out(size: int, offset: str = "0") -> str:
    """Shared memory, from its start, to the output."""
    return f"""
    shl.b32 %r60, %t, 2;
copying:
    setp.ge.u32 %p30, %r60, {size};
    @%p30 bra copied;
    add.u32 %r61, %smem, %r60;
    ld.shared.u32 %r62, [%r61];
    add.u32 %r63, %r60, {offset};
    cvt.u64.u32 %d30, %r63;
    add.u64 %d31, %out, %d30;
    st.global.u32 [%d31], %r62;
    add.u32 %r60, %r60, 128;
    bra copying;
copied:
"""


def load(made: Map, at: tuple[int, ...]) -> str:
    """A box to shared memory, waited for, and copied to the output."""
    size = int(np.prod(made.box)) * (1, 2, 4)[made.type]
    coordinates = ", ".join(f"%r{i}" for i in range(len(at)))
    return (
        INIT.format(count=1)
        + "".join(f"    mov.s32 %r{i}, {value};\n" for i, value in enumerate(at))
        + f"""
    @%p0 bra issued;
    mbarrier.arrive.expect_tx.shared::cta.b64 %d0, [%bar], {size};
    cp.async.bulk.tensor.{len(at)}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%smem], [%map0, {{{coordinates}}}], [%bar];
issued:
"""
        + WAIT.format(barrier="%bar", parity=0)
        + copy_out(size)
    )


def store(made: Map, at: tuple[int, ...]) -> str:
    """The input's bytes in shared memory, and a box of them stored to the output."""
    size = int(np.prod(made.box)) * (1, 2, 4)[made.type]
    coordinates = ", ".join(f"%r{i}" for i in range(len(at)))
    return (
        f"""
    shl.b32 %r60, %t, 2;
filling:
    setp.ge.u32 %p30, %r60, {size};
    @%p30 bra filled;
    cvt.u64.u32 %d30, %r60;
    add.u64 %d31, %in, %d30;
    ld.global.u32 %r62, [%d31];
    add.u32 %r61, %smem, %r60;
    st.shared.u32 [%r61], %r62;
    add.u32 %r60, %r60, 128;
    bra filling;
filled:
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p0, %t, 0;
    @%p0 bra stored;
"""
        + "".join(f"    mov.s32 %r{i}, {value};\n" for i, value in enumerate(at))
        + f"""
    cp.async.bulk.tensor.{len(at)}d.global.shared::cta.tile.bulk_group [%map0, {{{coordinates}}}], [%smem];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
stored:
"""
    )


def tensor_programs() -> Iterator[Hopper]:
    """Loads and stores: swizzles, out-of-bounds elements, ranks and element sizes."""
    for mode, row in ((0, 64), (1, 32), (2, 64), (3, 128)):
        made = Map("in", 0, (200, 50), (208,), (row, 24), mode)
        for at in ((16, 3), (-16, -5), (160, 40)):
            yield Hopper(f"TMA load, swizzle {mode} at {at}", kernel(load(made, at), 1), row * 24, 208 * 50, (made,))
        target = Map("out", 0, (200, 50), (208,), (row, 24), mode)
        for at in ((16, 3), (192, 3), (160, 40)):
            yield Hopper(
                f"TMA store, swizzle {mode} at {at}", kernel(store(target, at), 1), 208 * 50, row * 24, (target,)
            )
    for rank in (3, 4, 5):
        dims, box = (48, 6, 5, 4, 3)[:rank], (32, 4, 3, 2, 2)[:rank]
        strides = tuple(int(64 * np.prod(dims[1:d])) for d in range(1, rank))
        made = Map("in", 0, dims, strides, box)
        size = int(np.prod(box))
        yield Hopper(
            f"TMA load of rank {rank}",
            kernel(load(made, (16, 3, -1, 2, 1)[:rank]), 1),
            size,
            64 * 6 * 5 * 4 * 3,
            (made,),
        )
    for kind, size in ((1, 2), (2, 4)):
        made = Map("in", kind, (40, 30), (128 * size,), (32, 8), 0)
        yield Hopper(
            f"TMA load of {size}-byte elements", kernel(load(made, (24, -2)), 1), 256 * size, 128 * size * 30, (made,)
        )


def multicast() -> Hopper:
    """Each CTA of two loads half a tile for both."""
    made = Map("in", 0, (64, 32), (64,), (64, 8))
    body = (
        INIT.format(count=1)
        + """
    mov.u32 %r10, %cluster_ctarank;
    shl.b32 %r11, %r10, 3;
    mov.s32 %r0, 0;
    shl.b32 %r12, %r10, 9;
    add.u32 %r13, %smem, %r12;
    mov.u16 %h0, 3;
    @%p0 bra expected;
    mbarrier.arrive.expect_tx.shared::cta.b64 %d0, [%bar], 1024;
expected:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    @%p0 bra issued;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%r13], [%map0, {%r0, %r11}], [%bar], %h0;
issued:
"""
        + WAIT.format(barrier="%bar", parity=0)
        + "    shl.b32 %r20, %r10, 10;\n"
        + copy_out(1024, offset="%r20")
        + "    barrier.cluster.arrive.aligned;\n    barrier.cluster.wait.aligned;\n"
    )
    return Hopper("TMA load multicast to two CTAs", kernel(body, 1), 2048, 64 * 32, (made,), cluster=2, grid=2)


def replaced_map() -> Hopper:
    """A map is copied to shared memory, changed, copied to global memory and used: another address,
    extent and stride."""
    made = Map("in", 0, (64, 4), (64,), (64, 8))
    body = (
        INIT.format(count=1)
        + """
    @%p0 bra described;
"""
        + "".join(
            f"    ld.param.u64 %d2, [p_map0 + {8 * i}];\n    st.shared.u64 [%smem + {8 * i}], %d2;\n" for i in range(16)
        )
        + """
    add.u64 %d3, %in, 256;
    mov.u32 %r1, 6;
    mov.u64 %d4, 128;
    cvt.u64.u32 %d5, %smem;
    tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%d5], %d3;
    tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%d5], 1, %r1;
    tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%d5], 0, %d4;
described:
    bar.warp.sync -1;
    add.u64 %d6, %out, 512;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d6], [%smem], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%d6], 128;
    bar.sync 0;
    mov.s32 %r2, 0;
    @%p0 bra issued;
    fence.proxy.async;
    mbarrier.arrive.expect_tx.shared::cta.b64 %d0, [%bar], 512;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%smem], [%d6, {%r2, %r2}], [%bar];
issued:
"""
        + WAIT.format(barrier="%bar", parity=0)
        + copy_out(512)
    )
    # The map itself, 128 bytes from 512 on, is the driver's own format: it is compared as zeros.
    return Hopper("tensormap.replace", kernel(body, 1), 640, 2048, (made,), extra={"ignore": 512})


def phases() -> Hopper:
    """Parities answered after each of the arrivals that make two phases of two."""
    tests = ""
    for step in range(5):
        if step:
            tests += "    mbarrier.arrive.shared::cta.b64 %d0, [%bar];\n"
        for parity in (0, 1):
            tests += f"""
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [%bar], {parity};
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%out + {8 * step + 4 * parity}], %r1;
"""
    body = INIT.format(count=2) + "    @%p0 bra finished_all;\n" + tests + "finished_all:\n"
    return Hopper("mbarrier phases", kernel(body), 40)


def remote_arrive() -> Hopper:
    """All threads of two CTAs arrive on the first one's barrier, whose CTA then writes what both
    stored."""
    body = (
        INIT.format(count=64)
        + """
    mov.u32 %r10, %cluster_ctarank;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    shl.b32 %r1, %r10, 5;
    add.u32 %r2, %r1, %t;
    mul.lo.u32 %r3, %r2, 2654435761;
    shl.b32 %r4, %r2, 2;
    cvt.u64.u32 %d1, %r4;
    add.u64 %d2, %out, %d1;
    st.global.u32 [%d2], %r3;
    mov.u32 %r5, 0;
    mapa.shared::cluster.u32 %r6, %bar, %r5;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];
    setp.ne.u32 %p1, %r10, 0;
    @%p1 bra other;
"""
        + WAIT.format(barrier="%bar", parity=0).replace("try_wait.parity", "try_wait.parity.acquire.cluster")
        + """
    xor.b32 %r7, %r4, 128;
    cvt.u64.u32 %d3, %r7;
    add.u64 %d4, %out, %d3;
    ld.global.u32 %r8, [%d4];
    st.global.u32 [%d2 + 256], %r8;
other:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
"""
    )
    return Hopper("remote arrivals in a cluster", kernel(body), 384, cluster=2, grid=2)


def matrices() -> Iterator[Hopper]:
    """stmatrix and ldmatrix of one, two and four matrices, transposed and not."""
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            registers = ", ".join(f"%r{20 + i}" for i in range(count))
            loads = "".join(f"    ld.global.u32 %r{20 + i}, [%d1 + {128 * i}];\n" for i in range(count))
            zero = "".join(f"    st.shared.u32 [%r1 + {128 * i}], %r2;\n" for i in range(8))
            stores = "".join(f"    st.global.u32 [%d2 + {1024 + 128 * i}], %r{30 + i};\n" for i in range(count))
            back = ", ".join(f"%r{30 + i}" for i in range(count))
            body = f"""
    shl.b32 %r3, %t, 2;
    cvt.u64.u32 %d0, %r3;
    add.u64 %d1, %in, %d0;
    add.u64 %d2, %out, %d0;
{loads}    add.u32 %r1, %smem, %r3;
    mov.u32 %r2, 0;
{zero}    bar.sync 0;
    mul.lo.u32 %r4, %t, 32;
    add.u32 %r5, %smem, %r4;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r5], {{{registers}}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{back}}}, [%r5];
{stores}
""" + copy_out(1024)
            yield Hopper(f"stmatrix and ldmatrix x{count}{trans}", kernel(body), 1024 + 128 * count, 512)


def elected() -> Hopper:
    """How many lanes are elected, twice, from all and from the upper 16, and whether the leader is
    in the mask and the same."""
    body = """
    mov.u32 %r0, 0;
    mov.u32 %r1, 0;
    elect.sync %r2|%p1, -1;
    elect.sync %r3|%p2, -1;
    vote.sync.ballot.b32 %r4, %p1, -1;
    vote.sync.ballot.b32 %r5, %p2, -1;
    popc.b32 %r6, %r4;
    sub.u32 %r7, %r4, %r5;
    sub.u32 %r8, %r2, %r3;
    mov.u32 %r9, 1;
    shl.b32 %r9, %r9, %r2;
    sub.u32 %r10, %r9, %r4;
    setp.lt.u32 %p3, %t, 16;
    @%p3 bra lower;
    elect.sync %r11|%p4, 0xFFFF0000;
    vote.sync.ballot.b32 %r12, %p4, 0xFFFF0000;
    popc.b32 %r0, %r12;
    and.b32 %r1, %r12, 65535;
lower:
    shl.b32 %r13, %t, 4;
    cvt.u64.u32 %d0, %r13;
    add.u64 %d1, %out, %d0;
    or.b32 %r14, %r7, %r8;
    or.b32 %r14, %r14, %r10;
    st.global.v4.u32 [%d1], {%r6, %r14, %r0, %r1};
"""
    return Hopper("elect.sync", kernel(body), 512)


def dependent() -> Hopper:
    """A second kernel, launched programmatically, adds to what the first has written."""
    first = """
    griddepcontrol.launch_dependents;
    shl.b32 %r0, %t, 2;
    cvt.u64.u32 %d0, %r0;
    add.u64 %d1, %out, %d0;
    mul.lo.u32 %r1, %t, 3;
    st.global.u32 [%d1], %r1;
"""
    second = """
    shl.b32 %r0, %t, 2;
    cvt.u64.u32 %d0, %r0;
    add.u64 %d1, %out, %d0;
    griddepcontrol.wait;
    ld.global.u32 %r1, [%d1];
    add.u32 %r1, %r1, 7;
    st.global.u32 [%d1 + 128], %r1;
"""
    return Hopper("griddepcontrol", kernel(first), 256, second=kernel(second))


BINARY = (
    "add.s32", "sub.s32", "mul.lo.s32", "mul.hi.s32", "mul.hi.u32", "min.s32", "max.s32", "min.u32", "max.u32", "and.b32",
    "or.b32", "xor.b32", "shl.b32", "shr.u32", "shr.s32", "div.s32", "div.u32", "rem.s32", "rem.u32",
)  # fmt: skip
UNARY = ("not.b32", "neg.s32", "brev.b32", "popc.b32", "clz.b32", "bfind.u32", "bfind.shiftamt.u32", "abs.s32")
FLOATS = ("add.rn.f32", "sub.rn.f32", "mul.rn.f32", "min.f32", "max.f32")
COMPARISONS = ("lt.s32", "lt.u32", "ge.s32", "eq.s32", "lt.f32", "ge.f32", "ne.f32", "gtu.f32", "nan.f32")


def arithmetic() -> Hopper:
    """Integer, bit and float instructions on random bits, a result a lane."""
    lines: list[str] = []

    def keep(register: str = "%r3") -> None:
        lines.append(f"    st.global.u32 [%d2 + {128 * sum('st.global' in line for line in lines)}], {register};")

    for name in BINARY:
        lines.append(f"    {name} %r3, %r0, %r1;")
        keep()
    for name in UNARY:
        lines.append(f"    {name} %r3, %r0;")
        keep()
    for name in FLOATS:
        lines.append(f"    {name} %r3, %r0, %r1;")
        keep()
    for name in COMPARISONS:
        lines += [f"    setp.{name} %p1, %r0, %r1;", "    selp.u32 %r3, 1, 0, %p1;"]
        keep()
    for text in (
        "prmt.b32 %r3, %r0, %r1, %r2;", "bfe.u32 %r3, %r0, 5, 11;", "bfe.s32 %r3, %r0, 5, 11;", "bfi.b32 %r3, %r0, %r1, 7, 9;",
        "lop3.b32 %r3, %r0, %r1, %r2, 0xCA;", "shf.l.wrap.b32 %r3, %r0, %r1, %r2;", "shf.r.clamp.b32 %r3, %r0, %r1, %r2;",
        "mad.lo.s32 %r3, %r0, %r1, %r2;", "fma.rn.f32 %r3, %r0, %r1, %r2;", "cvt.rn.bf16x2.f32 %r3, %r0, %r1;",
        "cvt.rn.f16x2.f32 %r3, %r0, %r1;", "cvt.rn.f32.s32 %r3, %r0;", "cvt.rzi.s32.f32 %r3, %r0;",
        "shfl.sync.up.b32 %r3|%p1, %r0, 3, 0, -1;", "shfl.sync.bfly.b32 %r3|%p1, %r0, 5, 31, -1;",
        "shfl.sync.idx.b32 %r3|%p1, %r0, %r2, 31, -1;", "shfl.sync.down.b32 %r3|%p1, %r0, 9, 0x181f, -1;",
        "redux.sync.add.s32 %r3, %r0, -1;", "redux.sync.max.s32 %r3, %r0, -1;", "redux.sync.xor.b32 %r3, %r0, -1;",
    ):  # fmt: skip
        lines.append(f"    {text}")
        keep()
    lines += ["    cvt.rn.satfinite.e4m3x2.f32 %h1, %r0, %r1;", "    cvt.u32.u16 %r3, %h1;"]
    keep()
    count = sum("st.global" in line for line in lines)
    body = """
    shl.b32 %r4, %t, 2;
    cvt.u64.u32 %d0, %r4;
    add.u64 %d1, %in, %d0;
    add.u64 %d2, %out, %d0;
    ld.global.u32 %r0, [%d1];
    ld.global.u32 %r1, [%d1 + 128];
    ld.global.u32 %r2, [%d1 + 256];
""" + "\n".join(lines)
    return Hopper("arithmetic", kernel(body), 128 * count, 384)


def programs() -> list[Hopper]:
    """All of them."""
    single = (multicast(), replaced_map(), phases(), remote_arrive(), elected(), dependent(), arithmetic())
    return [*tensor_programs(), *single, *matrices()]
