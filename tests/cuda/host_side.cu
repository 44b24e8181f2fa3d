// The host side of every configuration: can_implement, workspace size and the encoding of the TMA
// descriptors.
//
// None of it instantiates a kernel, so all configurations compile in one module, for any
// architecture, and run on any GPU whose driver encodes TMA descriptors (Hopper or later).

#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/tvm_ffi.h>

#include "grouped_gemm_sm100.cuh"
#include "tensor_checks.cuh"

namespace hybrid_mxfp8 {
namespace {

// Builds the arguments of a call on tensors of this size, at addresses that are aligned but never
// read, and turns them into kernel parameters. Returns the workspace bytes, or a negative number:
// -1, CUTLASS does not take it; -2, the grid does not consist of whole clusters; otherwise minus a
// CUDA error code, less 100.
template <class Gemm>
int64_t check(Problem const& problem, Launch const& launch, char* buffer, int64_t capacity) {
  using Element = typename Gemm::Element;
  using ElementScale = typename Gemm::ElementScale;
  using ElementOut = typename Gemm::ElementOut;
  auto arrays = OperandArrays<Gemm>::in_arena(buffer, problem.num_experts);
  typename Gemm::Operands operands{
      reinterpret_cast<Element const*>(buffer), reinterpret_cast<ElementScale const*>(buffer),
      reinterpret_cast<Element const*>(buffer), reinterpret_cast<ElementScale const*>(buffer),
      reinterpret_cast<ElementOut*>(buffer)};
  auto args = Gemm::make_arguments(problem, operands, arrays, launch);
  if (Gemm::Gemm::can_implement(args) != cutlass::Status::kSuccess) {
    return -1;
  }
  int64_t bytes = Gemm::workspace_size(problem, launch);
  HYBRID_MXFP8_EXPECT(bytes <= capacity, ValueError) << "buffer: " << bytes << " bytes are needed";
  auto params = Gemm::Kernel::to_underlying_arguments(args, buffer + arrays.bytes);
  dim3 grid = Gemm::Kernel::get_grid_shape(params);
  if (grid.x % launch.cluster.x != 0 || grid.y % launch.cluster.y != 0 || grid.x == 0 || grid.y == 0 ||
      int(grid.x * grid.y) > launch.sm_count) {
    return -2;
  }
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? bytes : -100 - static_cast<int64_t>(error);
}

template <int CtaGroup, class Out>
int64_t check_tile(int64_t token_tile, Problem const& problem, Launch const& launch, char* buffer, int64_t capacity) {
  switch (token_tile) {
    case 64: return check<GroupedGemm<Config<CtaGroup, 64, Out>>>(problem, launch, buffer, capacity);
    case 128: return check<GroupedGemm<Config<CtaGroup, 128, Out>>>(problem, launch, buffer, capacity);
    case 192: return check<GroupedGemm<Config<CtaGroup, 192, Out>>>(problem, launch, buffer, capacity);
    case 256: return check<GroupedGemm<Config<CtaGroup, 256, Out>>>(problem, launch, buffer, capacity);
  }
  TVM_FFI_THROW(ValueError) << "token_tile: got " << token_tile;
}

int64_t host_side(ffi::TensorView buffer, int64_t cta_group, int64_t token_tile, int64_t num_experts, int64_t n,
                  int64_t k, int64_t num_tokens, int64_t sm_count, int64_t cluster_m, int64_t cluster_n) {
  Problem problem{static_cast<int>(num_experts), static_cast<int>(n), static_cast<int>(k),
                  static_cast<int>(num_tokens), num_tokens};
  Launch launch{buffer.device().device_id, static_cast<int>(sm_count), dim3(cluster_m, cluster_n, 1),
                dim3(cta_group, 1, 1)};
  auto address = static_cast<char*>(buffer.data_ptr());
  return cta_group == 1 ? check_tile<1, HYBRID_MXFP8_OUT>(token_tile, problem, launch, address, buffer.numel())
                        : check_tile<2, HYBRID_MXFP8_OUT>(token_tile, problem, launch, address, buffer.numel());
}


}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(host_side, host_side);

}  // namespace hybrid_mxfp8
