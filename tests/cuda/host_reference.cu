// What of a call can be checked on the CPU, with no GPU: its operands and its TMA descriptors.
//
// host_reference takes the tensors of a grouped_gemm call in host memory, builds Gemm::Arguments from
// them with the same functors, strides and layouts as the SM100 kernel's launch, and multiplies expert
// by expert with CUTLASS's own block-scaled reference, which reads the swizzled scales through CuTe's
// layout. A wrong offset, stride, operand order or swizzle therefore shows in the result.
//
// Descriptors are encoded by the function below, in the driver's place.

#include <vector>

#include <cuda.h>
#include <tvm/ffi/tvm_ffi.h>

#include "cutlass/util/reference/host/gett.hpp"

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

// The arrays of a call on the CPU; aligned as the launch demands it.
struct Workspace {
  explicit Workspace(size_t bytes) : memory(bytes + kWorkspaceAlignment) {}
  void* data() {
    return reinterpret_cast<void*>(round_up(reinterpret_cast<int64_t>(memory.data()), kWorkspaceAlignment));
  }
  std::vector<char> memory;
};

// Any configuration has the same operands; fp32 out shows the accumulator unrounded.
using Selected = GroupedGemm<Config<1, 128, float>>;

// All tensors on the CPU; `out` is fp32. Rows that belong to no expert are left as they are.
void host_reference(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
                    ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets,
                    ffi::TensorView scale_offsets, ffi::TensorView out) {
  HYBRID_MXFP8_EXPECT(x.device().device_type == kDLCPU, ValueError) << "x: expected a tensor on the CPU";
  Workspace workspace(OperandArrays<Selected>::carve(nullptr, static_cast<int>(w.size(0))).bytes);
  Call<Selected> call({x, x_scales, w, w_scales, tokens_per_expert, expert_offsets, scale_offsets, out},
                      workspace.data(), Launch{});
  PrepareExpert<Selected> prepare = call.prepare();

  for (int expert = 0; expert < call.problem.num_experts; ++expert) {
    prepare(expert);
    auto expert_operands = ExpertOperands<Selected>::read(call.args, expert);
    if (expert_operands.tokens == 0) {
      continue;
    }
    auto a = expert_operands.tensor_a();
    auto b = expert_operands.tensor_b();
    auto sfa = expert_operands.tensor_sfa();
    auto sfb = expert_operands.tensor_sfb();
    auto d = expert_operands.tensor_d();
    cutlass::reference::host::GettBlockScalingMainloopParams<float, decltype(a), decltype(sfa), decltype(b),
                                                             decltype(sfb)>
        mainloop{a, sfa, b, sfb};
    auto no_c = cute::make_tensor(static_cast<float*>(nullptr), d.layout());
    cutlass::reference::host::GettBlockScalingEpilogueParams<float, float, float, decltype(no_c), decltype(d)>
        epilogue{1.0f, 0.0f, no_c, d};
    cutlass::reference::host::Gemm3x(mainloop, epilogue);
  }
}

// Makes the kernel's parameters for a call and writes to `counts` (3,) int32: descriptors encoded, those
// found in the parameters, and those of them with bit 21.
template <class Gemm>
void descriptors(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
                 ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets, ffi::TensorView scale_offsets,
                 ffi::TensorView out, ffi::TensorView counts) {
  constexpr int kCtaGroup = cute::size<0>(typename Gemm::Kernel::TileShape{}) / 128;
  Launch launch{0, 148, dim3(kCtaGroup, 1, 1), dim3(kCtaGroup, 1, 1)};
  Workspace workspace(OperandArrays<Gemm>::carve(nullptr, static_cast<int>(w.size(0))).bytes + (1 << 21));
  Call<Gemm> call({x, x_scales, w, w_scales, tokens_per_expert, expert_offsets, scale_offsets, out},
                  workspace.data(), launch);
  auto count = static_cast<int32_t*>(counts.data_ptr());
  encoded = 0;
  auto params = call.params(workspace.data());
  count[0] = encoded;
  count[1] = count[2] = 0;
  auto words = reinterpret_cast<uint64_t const*>(&params);
  for (size_t word = 1; word < sizeof(params) / sizeof(uint64_t); ++word) {
    bool found = (words[word] & ~kBit21) == kEncoded;
    count[1] += found;
    count[2] += found && (words[word] & kBit21) != 0;
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(descriptors_1sm, descriptors<Selected>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(descriptors_2sm, (descriptors<GroupedGemm<Config<2, 64, float>>>));
TVM_FFI_DLL_EXPORT_TYPED_FUNC(host_reference, host_reference);

}  // namespace hybrid_mxfp8
