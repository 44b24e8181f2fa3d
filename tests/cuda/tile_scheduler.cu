// Runs the SM100 kernel's own tile scheduler, over the arrays that prepare wrote, and counts the
// tiles it hands out.
//
// The scheduler is arch-neutral code: a persistent grid in which every CTA takes tile indices a
// grid apart. Here one warp stands for each CTA and adds to a counter instead of multiplying.

#include <tvm/ffi/tvm_ffi.h>

#include "call.cuh"

namespace hybrid_mxfp8 {
namespace {

// What the scheduler hands tiles through in the real kernel; a lone warp has nobody to wait for.
struct NoPipeline {
  template <class State>
  CUTLASS_DEVICE void producer_acquire(State const&) {}
  template <class State>
  CUTLASS_DEVICE void producer_commit(State const&) {}
};
struct NoState {
  CUTLASS_DEVICE int index() const { return 0; }
};

// counts: (E, feature tiles of a CTA, token tiles), and one more entry for tiles outside.
template <class Kernel>
__global__ void count_tiles(typename Kernel::TileSchedulerParams params, int32_t* counts, int num_experts,
                            int weight_tiles, int token_tiles, int32_t* outside) {
  using Scheduler = typename Kernel::TileScheduler;
  __shared__ typename Scheduler::CLCResponse response[1];
  Scheduler scheduler(response, params);
  auto work = scheduler.initial_work_tile_info(cute::Shape<cute::_1, cute::_1, cute::_1>{});
  NoPipeline pipeline;
  NoState state;
  while (work.is_valid()) {
    auto coord = scheduler.work_tile_to_cta_coord(work);
    if (threadIdx.x == 0) {
      int m = cute::get<0>(coord);
      int n = cute::get<1>(coord);
      int expert = cute::get<3>(coord);
      bool inside = m >= 0 && m < weight_tiles && n >= 0 && n < token_tiles && expert >= 0 && expert < num_experts;
      atomicAdd(inside ? counts + (int64_t(expert) * weight_tiles + m) * token_tiles + n : outside, 1);
    }
    auto [next, advance] = scheduler.advance_to_next_work(pipeline, state);
    work = next;
    __syncwarp();
  }
}

// Counts into (E, weight_tiles, token_tiles) how often each CTA tile is handed out. The extents
// cover the last whole cluster; `outside` (1,) counts what lies beyond even that.
template <class Gemm>
void count(ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets, ffi::TensorView scale_offsets,
           Problem const& problem, Launch const& launch, ffi::TensorView workspace, ffi::TensorView counts,
           ffi::TensorView outside) {
  using Kernel = typename Gemm::Kernel;
  cudaStream_t stream = current_stream(tokens_per_expert.device());
  auto arrays = OperandArrays<Gemm>::in_arena(workspace.data_ptr(), problem.num_experts);
  HYBRID_MXFP8_EXPECT(workspace.numel() >= static_cast<int64_t>(arrays.bytes), ValueError)
      << "workspace: expected " << arrays.bytes << " bytes, got " << workspace.numel();
  ExpertOffsets offsets{static_cast<int32_t const*>(tokens_per_expert.data_ptr()),
                        static_cast<int32_t const*>(expert_offsets.data_ptr()),
                        static_cast<int32_t const*>(scale_offsets.data_ptr())};
  PrepareExpert<Gemm> prepare{problem, offsets, {}, arrays};
  TVM_FFI_CHECK_CUDA_ERROR(launch_prepare(prepare, stream));
  auto args = Gemm::make_arguments(problem, {}, arrays, launch);

  auto params = Kernel::TileScheduler::to_underlying_arguments(
      args.problem_shape, typename Kernel::TileShape{}, typename Kernel::AtomThrShapeMNK{},
      typename Kernel::ClusterShape{}, args.hw_info, args.scheduler, nullptr);
  auto cluster = cutlass::detail::select_cluster_shape(typename Kernel::ClusterShape{}, args.hw_info.cluster_shape);
  dim3 grid = Kernel::TileScheduler::get_grid_shape(params, args.problem_shape, typename Kernel::TileShape{},
                                                    typename Kernel::AtomThrShapeMNK{}, cluster, args.hw_info);
  count_tiles<Kernel><<<grid, cutlass::NumThreadsPerWarp, 0, stream>>>(
      params, static_cast<int32_t*>(counts.data_ptr()), problem.num_experts, static_cast<int>(counts.size(1)),
      static_cast<int>(counts.size(2)), static_cast<int32_t*>(outside.data_ptr()));
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

void tile_scheduler(ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets,
                    ffi::TensorView scale_offsets, ffi::TensorView workspace, ffi::TensorView counts,
                    ffi::TensorView outside, int64_t cta_group, int64_t token_tile, int64_t n, int64_t k,
                    int64_t num_tokens, int64_t scale_rows, int64_t sm_count, int64_t cluster_m,
                    int64_t cluster_n) {
  DLDevice device = tokens_per_expert.device();
  ffi::CUDADeviceGuard guard(device.device_id);
  Problem problem{static_cast<int>(tokens_per_expert.size(0)), static_cast<int>(n), static_cast<int>(k),
                  static_cast<int>(num_tokens), scale_rows};
  Launch launch{device.device_id, static_cast<int>(sm_count), dim3(cluster_m, cluster_n, 1),
                dim3(cta_group, 1, 1)};
  auto run = [&](auto gemm) {
    count<decltype(gemm)>(tokens_per_expert, expert_offsets, scale_offsets, problem, launch, workspace, counts,
                          outside);
  };
  if (cta_group == 1 && token_tile == 64) {
    run(GroupedGemm<Config<1, 64, cutlass::bfloat16_t>>{});
  } else if (cta_group == 1 && token_tile == 192) {
    run(GroupedGemm<Config<1, 192, cutlass::bfloat16_t>>{});
  } else if (cta_group == 2 && token_tile == 128) {
    run(GroupedGemm<Config<2, 128, cutlass::bfloat16_t>>{});
  } else {
    TVM_FFI_THROW(ValueError) << "no such configuration here";
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(tile_scheduler, tile_scheduler);

}  // namespace hybrid_mxfp8
