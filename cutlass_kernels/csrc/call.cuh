// One call, from its tensors to the kernel's parameters: all that there is before the GEMM's
// launch.
//
// The entry of the SM100 kernel and the references of the tests share this, so what the references
// multiply is what the kernel is given.
#pragma once

#include <tuple>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include "grouped_gemm_sm100.cuh"
#include "tensor_checks.cuh"

namespace hybrid_mxfp8 {

// Clears bit 21 of a TMA descriptor's second word. For tensors that are not dense and lie in less
// than 128 KB the driver's encoder may set it wrongly, and loads then fail with an illegal address;
// the release notes of NVIDIA's driver 595.71.05 say to clear it. The kernel re-describes tensors
// by patching addresses and extents, and the bit stays, so it is cleared in every descriptor.
// CUTLASS before 4.3.4 never does, later versions not for all tensors.
template <class Tma>
void clear_small_tensor_bit(Tma const& tma) {
  auto words = reinterpret_cast<uint64_t*>(const_cast<cute::TmaDescriptor*>(tma.get_tma_descriptor()));
  words[1] &= ~(uint64_t{1} << 21);
}

template <class Gemm>
struct Call {
  Problem problem;
  typename Gemm::Operands operands;
  ExpertOffsets offsets;
  OperandArrays<Gemm> arrays;
  typename Gemm::Arguments args;

  // Checks the tensors and lays the arrays out in `workspace`, which the caller has checked.
  Call(Tensors const& t, void* workspace, Launch const& launch)
      : problem(check_operands<typename Gemm::ElementOut>(t)),
        operands{static_cast<typename Gemm::Element const*>(t.w.data_ptr()),
                 static_cast<typename Gemm::ElementScale const*>(t.w_scales.data_ptr()),
                 static_cast<typename Gemm::Element const*>(t.x.data_ptr()),
                 static_cast<typename Gemm::ElementScale const*>(t.x_scales.data_ptr()),
                 static_cast<typename Gemm::ElementOut*>(t.out.data_ptr())},
        offsets{static_cast<int32_t const*>(t.tokens_per_expert.data_ptr()),
                static_cast<int32_t const*>(t.expert_offsets.data_ptr()),
                static_cast<int32_t const*>(t.scale_offsets.data_ptr())},
        arrays(OperandArrays<Gemm>::in_arena(workspace, problem.num_experts)),
        args(Gemm::make_arguments(problem, operands, arrays, launch)) {}

  bool empty() const { return problem.num_experts == 0 || problem.num_tokens == 0; }

  PrepareExpert<Gemm> prepare() const { return {problem, offsets, operands, arrays}; }

  // Checks that the workspace holds the arrays and CUTLASS's own part.
  void check_workspace(ffi::TensorView const& workspace, DLDevice device) const {
    check_memory(workspace, "workspace", device, kWorkspaceAlignment);
    int64_t given = workspace.numel() * workspace.dtype().bits / 8;
    int64_t needed = arrays.bytes + Gemm::Gemm::get_workspace_size(args);
    HYBRID_MXFP8_EXPECT(given >= needed, ValueError)
        << "workspace: expected at least " << needed << " bytes, got " << given;
  }

  // The kernel's parameters; encodes the TMA descriptors that the host knows.
  typename Gemm::Kernel::Params params(void* workspace) const {
    auto params = Gemm::Kernel::to_underlying_arguments(args, static_cast<char*>(workspace) + arrays.bytes);
    auto const& loads = params.mainloop;
    std::apply([](auto const&... tma) { (clear_small_tensor_bit(tma), ...); },
               std::tie(loads.tma_load_a, loads.tma_load_b, loads.tma_load_sfa, loads.tma_load_sfb,
                        loads.tma_load_a_fallback, loads.tma_load_b_fallback, loads.tma_load_sfa_fallback,
                        loads.tma_load_sfb_fallback, params.epilogue.tma_store_d));
    return params;
  }
};

// torch's current stream on the device of the tensors of this call.
inline cudaStream_t current_stream(DLDevice device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

}  // namespace hybrid_mxfp8
