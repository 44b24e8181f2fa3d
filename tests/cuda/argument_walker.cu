// Walks the SM100 kernel's own arguments with plain FMAs, on any GPU.
//
// The arguments are made as for a launch: prepare_kernel writes the arrays into the workspace on
// the device, and Gemm::Arguments holds their addresses. A kernel with nothing of Blackwell in it
// then takes those arguments by value and multiplies what they say. It differs from the SM100
// kernel in the inner loop alone, so a wrong pointer, stride, layout, count or order of operands
// shows here.

#include <tvm/ffi/tvm_ffi.h>

#include "call.cuh"
#include "read_arguments.cuh"

namespace hybrid_mxfp8 {
namespace {

using Selected = GroupedGemm<Config<1, 128, float>>;

// What everything_but_the_gemm prepares: Hopper's driver refuses the descriptor of an fp32 output,
// whose swizzle is Blackwell's.
using Timed = GroupedGemm<Config<1, 128, cutlass::bfloat16_t>>;

constexpr int kRowsPerBlock = 128;  // output features of one block, a thread each

// Block (feature tile, expert); each thread computes one output feature for all tokens of the
// expert.
template <class Gemm>
__global__ void walk(typename Gemm::Arguments args) {
  auto operands = ExpertOperands<Gemm>::read(args, blockIdx.y);
  int row = blockIdx.x * kRowsPerBlock + threadIdx.x;
  if (row >= operands.n) {
    return;
  }
  auto a = operands.tensor_a();
  auto b = operands.tensor_b();
  auto d = operands.tensor_d();
  auto sfa = operands.tensor_sfa();
  auto sfb = operands.tensor_sfb();
  for (int token = 0; token < operands.tokens; ++token) {
    float sum = 0.0f;
    for (int k = 0; k < operands.k; ++k) {
      float weight = float(a(row, k, 0)) * float(sfa(row, k, 0));
      float x = float(b(token, k, 0)) * float(sfb(token, k, 0));
      sum = fmaf(weight, x, sum);
    }
    d(row, token, 0) = typename Gemm::ElementOut(sum);
  }
}

constexpr int kSmCount = 148;

Launch make_launch(DLDevice device) {
  return {device.device_id, kSmCount, dim3(1, 1, 1), dim3(1, 1, 1)};
}

template <class Gemm>
int64_t workspace_size(int64_t num_experts, int64_t n, int64_t k, int64_t num_tokens) {
  Problem problem{static_cast<int>(num_experts), static_cast<int>(n), static_cast<int>(k),
                  static_cast<int>(num_tokens), 0};
  return Gemm::workspace_size(problem, make_launch({kDLCUDA, 0}));
}

// A call as the SM100 kernel's, with the walk in its place.
void argument_walker(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
                     ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets,
                     ffi::TensorView scale_offsets, ffi::TensorView out, ffi::TensorView workspace) {
  DLDevice device = x.device();
  Call<Selected> call({x, x_scales, w, w_scales, tokens_per_expert, expert_offsets, scale_offsets, out},
                      workspace.data_ptr(), make_launch(device));
  if (call.empty()) {
    return;
  }
  call.check_workspace(workspace, device);
  ffi::CUDADeviceGuard guard(device.device_id);
  cudaStream_t stream = current_stream(device);
  TVM_FFI_CHECK_CUDA_ERROR(launch_prepare(call.prepare(), stream));
  dim3 grid((call.problem.n + kRowsPerBlock - 1) / kRowsPerBlock, call.problem.num_experts);
  walk<Selected><<<grid, kRowsPerBlock, 0, stream>>>(call.args);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

// A call as the SM100 kernel's up to the GEMM's launch, whose cost to the host it shows: checks,
// arguments, the launch of prepare_kernel and the encoding of descriptors.
void everything_but_the_gemm(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w,
                             ffi::TensorView w_scales, ffi::TensorView tokens_per_expert,
                             ffi::TensorView expert_offsets, ffi::TensorView scale_offsets, ffi::TensorView out,
                             ffi::TensorView workspace, int64_t, int64_t, int64_t, bool) {
  DLDevice device = x.device();
  Call<Timed> call({x, x_scales, w, w_scales, tokens_per_expert, expert_offsets, scale_offsets, out},
                   workspace.data_ptr(), make_launch(device));
  call.check_workspace(workspace, device);
  ffi::CUDADeviceGuard guard(device.device_id);
  TVM_FFI_CHECK_CUDA_ERROR(launch_prepare(call.prepare(), current_stream(device)));
  auto params = call.params(workspace.data_ptr());
  HYBRID_MXFP8_EXPECT(Timed::Kernel::get_grid_shape(params).x > 0, RuntimeError) << "no grid";
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(argument_walker, argument_walker);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(walker_workspace_size, workspace_size<Selected>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(timed_workspace_size, workspace_size<Timed>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(everything_but_the_gemm, everything_but_the_gemm);

}  // namespace hybrid_mxfp8
