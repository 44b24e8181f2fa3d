// What the kernel's loads are given, on the CPU: the TMA descriptors of a call, which the function
// below encodes in the driver's place, and the coordinates at which the mainloop loads scales.

#include <cuda.h>
#include <tvm/ffi/tvm_ffi.h>

#include "call.cuh"
#include "read_arguments.cuh"

#ifndef HYBRID_MXFP8_ENCODER  // mutants of this file are compiled as one
#define HYBRID_MXFP8_ENCODER

// A descriptor's second word, by which it is found again. Bit 21 is the one that the driver may set
// wrongly; here it is always set.
constexpr uint64_t kEncoded = 0x5aa5'0000'0000'5aa5;
constexpr uint64_t kBit21 = uint64_t{1} << 21;
static int encoded = 0;

extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* address,
                                                   cuuint64_t const*, cuuint64_t const*, cuuint32_t const*,
                                                   cuuint32_t const*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = {};
  map->opaque[0] = reinterpret_cast<uint64_t>(address);
  map->opaque[1] = kEncoded | kBit21;
  ++encoded;
  return CUDA_SUCCESS;
}
#endif

namespace hybrid_mxfp8 {
namespace {

// Makes the kernel's parameters for a call and writes to `counts` (3,) int32: descriptors encoded,
// those found in the parameters, and those of them with bit 21.
template <class Gemm>
void descriptors(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
                 ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets, ffi::TensorView scale_offsets,
                 ffi::TensorView out, ffi::TensorView counts) {
  constexpr int kCtaGroup = cute::size<0>(typename Gemm::Kernel::TileShape{}) / 128;
  Launch launch{0, 148, dim3(kCtaGroup, 1, 1), dim3(kCtaGroup, 1, 1)};
  HostWorkspace workspace(OperandArrays<Gemm>::in_arena(nullptr, static_cast<int>(w.size(0))).bytes + (1 << 21));
  Call<Gemm> call({x, x_scales, w, w_scales, tokens_per_expert, expert_offsets, scale_offsets, out},
                  workspace.data(), launch);
  auto count = static_cast<int32_t*>(counts.data_ptr());
  encoded = 0;
  auto params = call.params(workspace.data());
  count[0] = encoded;
  count[1] = count[2] = 0;
  auto words = reinterpret_cast<uint64_t const*>(&params);
  // A whole descriptor at its alignment, since the padding of `params` may hold words of old ones.
  constexpr size_t kWords = sizeof(CUtensorMap) / sizeof(uint64_t), kStep = alignof(CUtensorMap) / sizeof(uint64_t);
  for (size_t word = 0; word + kWords <= sizeof(params) / sizeof(uint64_t); word += kStep) {
    bool found = (words[word + 1] & ~kBit21) == kEncoded;
    for (size_t rest = 2; rest < kWords; ++rest) found = found && words[word + rest] == 0;
    count[1] += found;
    count[2] += found && (words[word + 1] & kBit21) != 0;
  }
}

// Writes to `blocks`, an int32 for each tile of an expert's tokens, which 128-row block of their
// scales the mainloop's load of the tile begins with; -1 for none.
template <class Gemm>
void scale_blocks(ffi::TensorView blocks) {
  using Mainloop = typename Gemm::CollectiveMainloop;
  int tokens = static_cast<int>(blocks.size(0)) * cute::size<1>(typename Gemm::Kernel::TileShape{});
  Problem problem{1, 128, 128, tokens, tokens + 128};
  Launch launch{0, 148, dim3(1, 1, 1), dim3(1, 1, 1)};
  HostWorkspace workspace(1 << 21);
  auto arrays = OperandArrays<Gemm>::in_arena(workspace.data(), 1);
  auto params = Gemm::Kernel::to_underlying_arguments(Gemm::make_arguments(problem, {}, arrays, launch),
                                                      static_cast<char*>(workspace.data()) + arrays.bytes);
  Mainloop mainloop(params.mainloop, cute::make_shape(1, 1, cute::_1{}), 0);
  typename Mainloop::TensorStorage tensors;
  typename Mainloop::TensorMapStorage maps;
  auto shape = cute::make_shape(problem.n, tokens, problem.k, 1);
#if HYBRID_MXFP8_RAGGED
  auto loads = mainloop.template load_init<true>(shape, params.mainloop, tensors, maps, 148, 0, 1, 0);
#else
  auto loads = mainloop.load_init(shape, params.mainloop, tensors, maps, 148, 0, 0);
#endif
  auto scales = cute::get<7>(loads);  // tBgSFB_nkl: (copy, tile of tokens, tile of k, l)
  auto layout = Gemm::token_scale_layout(problem.n, tokens, problem.k);
  auto all = params.mainloop.tma_load_sfb.get_tma_tensor(cute::shape(layout));  // (rows, k, l)
  for (int tile = 0; tile < blocks.size(0); ++tile) {
    auto begin = scales(cute::_, tile, 0, 0)(0);
    int32_t& block = static_cast<int32_t*>(blocks.data_ptr())[tile];
    for (block = tokens / kScaleTileRows; block >= 0 && begin != all(block * kScaleTileRows, 0, 0); --block) {
    }
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(descriptors, (descriptors<GroupedGemm<Config<2, 128, float>>>));
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scale_blocks_64, (scale_blocks<GroupedGemm<Config<1, 64, float>>>));
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scale_blocks_192, (scale_blocks<GroupedGemm<Config<1, 192, float>>>));

}  // namespace hybrid_mxfp8
