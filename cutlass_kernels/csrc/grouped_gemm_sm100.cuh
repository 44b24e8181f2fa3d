// The block-scaled grouped GEMM of the SM100 family, as types, and its arguments.
//
// CUTLASS's operand A is the weights and B the tokens, so its M is our N and its N the tokens of an
// expert:
//
//     D_e (N x tokens_e, column-major) = W_e (N x K, row-major) * X_e (K x tokens_e, column-major)
//
// which in memory is out (T, N) = x (T, K) * w^T, row-major as PyTorch has it. The swap lets the
// token side take tiles of 64 to 256 while the weights fill the 128 (1SM) or 256 (2SM) rows of the
// tensor core.
//
// Two mainloops share this source. The ragged-contiguous one (CUTLASS 4.4 and later) knows that
// only the tokens are ragged: one host-built descriptor serves the weights of all experts. The
// pointer-array one re-describes all operands per expert and also builds with CUTLASS 4.2.
//
// Nothing here instantiates a kernel: that is left to whoever calls Gemm::run.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/version.h"

#include "prepare.cuh"

// 1: the ragged-contiguous mainloop, 0: pointer arrays.
#define HYBRID_MXFP8_RAGGED (CUTLASS_VERSION >= 440)

namespace hybrid_mxfp8 {

// Whether the kernel may be launched while prepare_kernel runs. Before 4.4 its tile scheduler reads
// the token counts ahead of griddepcontrol.wait; until 4.5.3 the wait is an asm without a memory
// clobber, so the compiler may move that read ahead of it.
constexpr bool kPdlIsSafe = CUTLASS_VERSION >= 460;

// The shapes of all experts, for the pointer-array mainloop: N and K are common, the tokens an
// array.
struct ExpertProblemShape {
  using UnderlyingProblemShape = cute::Shape<int, int, int>;

  int n = 0;
  int k = 0;
  int num_experts = 0;
  int32_t const* tokens = nullptr;

  CUTLASS_HOST_DEVICE int groups() const { return num_experts; }
  CUTLASS_HOST_DEVICE UnderlyingProblemShape get_problem_shape(int expert) const {
    return {n, tokens[expert], k};
  }
  // The host does not know the tokens of an expert.
  CUTLASS_HOST_DEVICE UnderlyingProblemShape get_host_problem_shape(int) const { return {n, 0, k}; }
  CUTLASS_HOST_DEVICE bool is_host_problem_shape_available() const { return false; }
};

// A tile configuration. CtaGroup is the number of SMs that one MMA spans.
template <int CtaGroup, int TokenTile, class Out>
struct Config {
  static_assert(CtaGroup == 1 || CtaGroup == 2, "an MMA spans one SM or two");
  static constexpr int kTokenTile = TokenTile;
  using ElementOut = Out;
  using TileShape = cute::Shape<cute::Int<128 * CtaGroup>, cute::Int<TokenTile>, cute::_128>;
  using MainloopSchedule =
      cute::conditional_t<CtaGroup == 1, cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmMxf8f6f4Sm100,
                          cutlass::gemm::KernelPtrArrayTmaWarpSpecialized2SmMxf8f6f4Sm100>;
  using EpilogueSchedule = cute::conditional_t<CtaGroup == 1, cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm,
                                               cutlass::epilogue::PtrArrayTmaWarpSpecialized2Sm>;
};

// The part of D that the epilogue takes at a time. With tiles of 256 tokens CUTLASS takes 128
// columns. Their two buffers leave operands one stage less than 64 columns do, in fp32 one or two in
// all; and the next tile's MMA waits for half of the epilogue instead of a quarter.
template <int TokenTile>
using EpilogueTile = cute::conditional_t<TokenTile == 256, cute::Shape<cute::_128, cute::_64>,
                                         cutlass::epilogue::collective::EpilogueTileAuto>;

// How a call is launched: the cluster that the hardware should prefer, the one it may fall back to
// where the preferred one does not fit, and the SMs that the persistent grid fills.
struct Launch {
  int device;
  int sm_count;
  dim3 cluster;
  dim3 cluster_fallback;
};

template <class Config>
struct GroupedGemm {
  static constexpr bool kRagged = HYBRID_MXFP8_RAGGED;

  using Element = cutlass::float_e4m3_t;
  using ElementScale = cutlass::float_ue8m0_t;
  using ElementOut = typename Config::ElementOut;
  using Operands = hybrid_mxfp8::Operands<Element, ElementScale, ElementOut>;
  using MxElement = cutlass::mx_float8_t<Element>;

  static constexpr int kAlignment = 16;  // elements of 16 bytes of e4m3
  static constexpr int kAlignmentOut = 16 / sizeof(ElementOut);

  using LayoutWeights = cutlass::layout::RowMajor;
  using LayoutTokens = cutlass::layout::ColumnMajor;
  using LayoutOut = cutlass::layout::ColumnMajor;

  // Both cluster extents are chosen at run time.
  using ClusterShape = cute::Shape<int32_t, int32_t, cute::_1>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp,  //
      typename Config::TileShape, ClusterShape,                         //
      EpilogueTile<Config::kTokenTile>,                                 //
      float, float,                                                     // accumulator, compute
      void, LayoutOut*, kAlignmentOut,                                  // C: none
      ElementOut, LayoutOut*, kAlignmentOut,                            // D
      typename Config::EpilogueSchedule>::CollectiveOp;

  // The builder takes the ragged mainloop when the tokens are an array of pointers and the weights
  // are not.
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp,                             //
      MxElement, cute::conditional_t<kRagged, LayoutWeights, LayoutWeights*>, kAlignment,          // A
      MxElement, LayoutTokens*, kAlignment,                                                        // B
      float, typename Config::TileShape, ClusterShape,                                             //
      cutlass::gemm::collective::StageCountAutoCarveout<
          static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,                   //
      typename Config::MainloopSchedule>::CollectiveOp;

#if HYBRID_MXFP8_RAGGED
  using ProblemShape = cutlass::gemm::MoEProblemShape<cute::Shape<int, int, int>>;
#else
  using ProblemShape = ExpertProblemShape;
#endif

  // Stages: with fewer loads and MMA take turns. D: its two buffers of 64 columns, as above.
  static constexpr int kStages = CollectiveMainloop::DispatchPolicy::Stages;
  static constexpr int kEpilogueColumns = cute::size<1>(typename CollectiveEpilogue::EpilogueTile{});
  static_assert(kStages >= (Config::kTokenTile == 256 ? 3 : 4), "too few stages of operands");
  static_assert(kEpilogueColumns <= 64, "the epilogue takes too many columns at a time");

  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Gemm::Arguments;

#ifdef __CUDA_ARCH__  // CUTLASS lays tensor memory out in functions that the host's compiler does not see
  template <class Tensor>
  static constexpr int columns_of() {
    using Layout = decltype(cute::recast<uint32_t>(cute::declval<Tensor&>()).layout());
    return static_cast<int>(cute::cosize(Layout{}) & cutlass::detail::TmemColMask);
  }
  // Columns of tensor memory, of the 512 that there are: the accumulators of two tiles, which
  // overlap by one part of the epilogue where both don't fit, then the scales of the weights and of
  // the tokens. CUTLASS does not check.
  static constexpr int tensor_memory_columns() {
    using Part = typename CollectiveEpilogue::EpilogueTile;
    using Memory =
        decltype(CollectiveMainloop::template init_tmem_tensors<Part, Kernel::IsOverlappingAccum>(Part{}));
    return columns_of<decltype(Memory::accumulators)>() + columns_of<decltype(Memory::tCtSFA)>() +
           columns_of<decltype(Memory::tCtSFB)>();
  }
#endif

  using WeightStride = typename Kernel::InternalStrideA;
  using TokenStride = typename Kernel::InternalStrideB;
  using OutStride = typename Kernel::InternalStrideD;
  using ScaleConfig = cutlass::detail::Sm1xxBlockScaledConfig<kScaleBlock>;
  using ScaleLayout = typename CollectiveMainloop::InternalLayoutSFB;

  CUTLASS_HOST_DEVICE static WeightStride weight_stride(int k) { return {k, cute::_1{}, cute::_0{}}; }
  CUTLASS_HOST_DEVICE static TokenStride token_stride(int k) { return {k, cute::_1{}, cute::_0{}}; }
  CUTLASS_HOST_DEVICE static OutStride out_stride(int n) { return {cute::_1{}, n, cute::_0{}}; }
  CUTLASS_HOST_DEVICE static ScaleLayout weight_scale_layout(int n, int tokens, int k) {
    return ScaleConfig::tile_atom_to_shape_SFA(cute::make_shape(n, tokens, k, 1));
  }
  CUTLASS_HOST_DEVICE static ScaleLayout token_scale_layout(int n, int tokens, int k) {
    return ScaleConfig::tile_atom_to_shape_SFB(cute::make_shape(n, tokens, k, 1));
  }

  // What CUTLASS takes. `arrays` need not be filled yet: only their addresses are read here.
  static Arguments make_arguments(Problem const& problem, Operands const& operands,
                                  OperandArrays<GroupedGemm> const& arrays, Launch const& launch) {
    Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;

    if constexpr (kRagged) {
      args.problem_shape.max_m = problem.n;
      args.problem_shape.max_n = problem.num_tokens;
      args.problem_shape.max_k = problem.k;
      args.problem_shape.num_groups = problem.num_experts;
      args.problem_shape.tokens_per_expert = arrays.tokens;
      args.mainloop.ptr_A = operands.weights;
      args.mainloop.ptr_SFA = operands.weight_scales;
    } else {
      args.problem_shape = {problem.n, problem.k, problem.num_experts, arrays.tokens};
      args.mainloop.ptr_A = arrays.weights;
      args.mainloop.ptr_SFA = arrays.weight_scales;
      args.mainloop.dA = arrays.weight_stride;
      args.mainloop.dB = arrays.token_stride;
      args.mainloop.layout_SFA = arrays.weight_scale_layout;
      args.mainloop.layout_SFB = arrays.token_scale_layout;
    }
    args.mainloop.ptr_B = arrays.token_rows;
    args.mainloop.ptr_SFB = arrays.token_scales;

    args.epilogue.thread.alpha = 1.0f;
    args.epilogue.thread.beta = 0.0f;
    args.epilogue.ptr_D = arrays.out;
    args.epilogue.dD = arrays.out_stride;

    args.hw_info.device_id = launch.device;
    args.hw_info.sm_count = launch.sm_count;
    args.hw_info.cluster_shape = launch.cluster;
    args.hw_info.cluster_shape_fallback = launch.cluster_fallback;

    // Neighbouring CTAs take neighbouring weight rows of the same tokens, which are then read once.
    using RasterOrder = decltype(args.scheduler.raster_order);
    args.scheduler.raster_order = RasterOrder::AlongM;
    return args;
  }

  // Bytes of one call's workspace: the arrays that prepare fills, then CUTLASS's own.
  static size_t workspace_size(Problem const& problem, Launch const& launch) {
    auto arrays = OperandArrays<GroupedGemm>::in_arena(nullptr, problem.num_experts);
    return arrays.bytes + Gemm::get_workspace_size(make_arguments(problem, {}, arrays, launch));
  }
};

}  // namespace hybrid_mxfp8
