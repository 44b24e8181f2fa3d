// Walks the SM100 kernel's own arguments with plain FMAs, on any GPU.
//
// The arguments are made as for a launch: prepare_kernel writes the arrays into the workspace on the device, and
// Gemm::Arguments holds their addresses. A kernel with nothing of Blackwell in it then takes those arguments by value
// and multiplies what they say. It differs from the SM100 kernel in the inner loop alone, so a wrong pointer,
// stride, layout, count or order of operands shows here.

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/tvm_ffi.h>

#include "read_arguments.cuh"
#include "tensor_checks.cuh"

namespace hybrid_mxfp8 {
namespace {

using Selected = GroupedGemm<Config<1, 128, float>>;

constexpr int kRowsPerBlock = 128;  // output features of one block, a thread each

// Block (feature tile, expert); each thread computes one output feature for all tokens of the expert.
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

// Bytes of workspace: prepare's arrays alone, as CUTLASS's own part is never touched.
int64_t workspace_size(int64_t num_experts) {
  return OperandArrays<Selected>::carve(nullptr, static_cast<int>(num_experts)).bytes;
}

void argument_walker(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
                     ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets,
                     ffi::TensorView scale_offsets, ffi::TensorView out, ffi::TensorView workspace) {
  Problem problem = check_operands<Selected::ElementOut>(x, x_scales, w, w_scales, tokens_per_expert,
                                                         expert_offsets, scale_offsets, out);
  DLDevice device = x.device();
  ffi::CUDADeviceGuard guard(device.device_id);
  auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  check_tensor(workspace, "workspace", device);
  auto operands = make_operands<Selected>(x, x_scales, w, w_scales, out);
  auto arrays = OperandArrays<Selected>::carve(workspace.data_ptr(), problem.num_experts);
  HYBRID_MXFP8_EXPECT(workspace.numel() >= static_cast<int64_t>(arrays.bytes), ValueError)
      << "workspace: expected " << arrays.bytes << " bytes, got " << workspace.numel();
  auto args = Selected::make_arguments(problem, operands, arrays, Launch{});
  PrepareExpert<Selected> prepare{problem, make_offsets(tokens_per_expert, expert_offsets, scale_offsets),
                                  operands, arrays};
  TVM_FFI_CHECK_CUDA_ERROR(launch_prepare(prepare, stream));
  dim3 grid((problem.n + kRowsPerBlock - 1) / kRowsPerBlock, problem.num_experts);
  walk<Selected><<<grid, kRowsPerBlock, 0, stream>>>(args);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(argument_walker, argument_walker);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(walker_workspace_size, workspace_size);

}  // namespace hybrid_mxfp8
