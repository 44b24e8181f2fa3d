// CUTLASS multiplies the operands, on the CPU.
//
// Takes the tensors of a grouped_gemm call in host memory, builds Gemm::Arguments from them with
// the same functors, strides and layouts as the SM100 kernel's launch, and multiplies expert by
// expert with CUTLASS's own block-scaled reference, which reads the swizzled scales through CuTe's
// layout. A wrong offset, stride, operand order or swizzle therefore shows in the result, with no
// GPU.

#include <tvm/ffi/tvm_ffi.h>

#include "cutlass/util/reference/host/gett.hpp"

#include "call.cuh"
#include "read_arguments.cuh"

namespace hybrid_mxfp8 {
namespace {

// Any configuration has the same operands; fp32 out shows the accumulator unrounded.
using Selected = GroupedGemm<Config<1, 128, float>>;

// All tensors on the CPU; `out` is fp32. Rows that belong to no expert are left as they are.
void host_reference(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
                    ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets,
                    ffi::TensorView scale_offsets, ffi::TensorView out) {
  HYBRID_MXFP8_EXPECT(x.device().device_type == kDLCPU, ValueError) << "x: expected a tensor on the CPU";
  HostWorkspace workspace(OperandArrays<Selected>::in_arena(nullptr, static_cast<int>(w.size(0))).bytes);
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

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(host_reference, host_reference);

}  // namespace hybrid_mxfp8
