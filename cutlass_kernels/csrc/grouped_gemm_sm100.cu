// The grouped GEMM of one tile configuration, exported to Python through tvm-ffi.
//
// Compiled once per configuration, with
//     HYBRID_MXFP8_CTA_GROUP    1 or 2, the SMs of one MMA
//     HYBRID_MXFP8_TOKEN_TILE   64, 128, 192 or 256
//     HYBRID_MXFP8_OUT          cutlass::bfloat16_t, cutlass::half_t or float
// and with the mainloop that the CUTLASS headers have.
//
// A call is two launches on the caller's stream: prepare_kernel writes the per-expert arrays into
// the workspace, the GEMM follows, programmatically where that is allowed, so that its prologue
// overlaps. Python has checked shapes and chosen the configuration; what would corrupt memory is
// checked again here.

#include <atomic>

#include <tvm/ffi/tvm_ffi.h>

#include "call.cuh"

namespace hybrid_mxfp8 {
namespace {

using Selected = GroupedGemm<Config<HYBRID_MXFP8_CTA_GROUP, HYBRID_MXFP8_TOKEN_TILE, HYBRID_MXFP8_OUT>>;

#ifdef __CUDA_ARCH__
static_assert(Selected::tensor_memory_columns() <= 512, "tensor memory has 512 columns");
#endif

constexpr int kMaxDevices = 64;

// Runs once per device: refuses other architectures and raises the kernel's shared memory limit.
void enable_device(int device) {
  static std::atomic<bool> enabled[kMaxDevices];
  HYBRID_MXFP8_EXPECT(device < kMaxDevices, RuntimeError) << "device " << device << " is out of range";
  if (enabled[device].load(std::memory_order_acquire)) {
    return;
  }
  int major = 0;
  int minor = 0;
  TVM_FFI_CHECK_CUDA_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  TVM_FFI_CHECK_CUDA_ERROR(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  HYBRID_MXFP8_EXPECT(major == 10 && (minor == 0 || minor == 3), RuntimeError)
      << "the CUTLASS backend needs compute capability 10.0 or 10.3, device " << device << " has " << major
      << "." << minor;
  TVM_FFI_CHECK_CUDA_ERROR(cudaFuncSetAttribute(cutlass::device_kernel<typename Selected::Kernel>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                Selected::Kernel::SharedStorageSize));
  enabled[device].store(true, std::memory_order_release);
}

Launch make_launch(int device, int64_t sm_count, int64_t cluster_m, int64_t cluster_n) {
  return {device, static_cast<int>(sm_count), dim3(cluster_m, cluster_n, 1), dim3(HYBRID_MXFP8_CTA_GROUP, 1, 1)};
}

int64_t workspace_size(int64_t num_experts, int64_t n, int64_t k, int64_t num_tokens, int64_t sm_count) {
  Problem problem{static_cast<int>(num_experts), static_cast<int>(n), static_cast<int>(k),
                  static_cast<int>(num_tokens), /*scale_rows=*/0};
  return Selected::workspace_size(problem, make_launch(0, sm_count, HYBRID_MXFP8_CTA_GROUP, 1));
}

// out[rows of e] = x[rows of e] @ w[e]^T for every expert e.
void grouped_gemm(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
                  ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets,
                  ffi::TensorView scale_offsets, ffi::TensorView out, ffi::TensorView workspace,
                  int64_t cluster_m, int64_t cluster_n, int64_t sm_count, bool pdl) {
  DLDevice device = x.device();
  Launch launch = make_launch(device.device_id, sm_count, cluster_m, cluster_n);
  Call<Selected> call({x, x_scales, w, w_scales, tokens_per_expert, expert_offsets, scale_offsets, out},
                      workspace.data_ptr(), launch);
  if (call.empty()) {
    return;
  }
  call.check_workspace(workspace, device);
  HYBRID_MXFP8_EXPECT(Selected::Gemm::can_implement(call.args) == cutlass::Status::kSuccess, ValueError)
      << "cluster: CUTLASS does not take (" << cluster_m << ", " << cluster_n << ") for this configuration";

  ffi::CUDADeviceGuard guard(device.device_id);
  enable_device(device.device_id);
  cudaStream_t stream = current_stream(device);
  TVM_FFI_CHECK_CUDA_ERROR(launch_prepare(call.prepare(), stream));
  auto params = call.params(workspace.data_ptr());
  cutlass::Status status = Selected::Gemm::run(params, stream, /*cuda_adapter=*/nullptr, pdl && kPdlIsSafe);
  HYBRID_MXFP8_EXPECT(status == cutlass::Status::kSuccess, RuntimeError)
      << "grouped_gemm: the launch failed: " << cutlass::cutlassGetStatusString(status);
}

// Facts of the compiled kernel, for doctor and tests.
int64_t shared_memory_bytes() { return Selected::Kernel::SharedStorageSize; }
int64_t mainloop_stages() { return Selected::kStages; }
bool launches_dependently() { return kPdlIsSafe; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm, grouped_gemm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_size, workspace_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shared_memory_bytes, shared_memory_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mainloop_stages, mainloop_stages);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(launches_dependently, launches_dependently);

}  // namespace hybrid_mxfp8
