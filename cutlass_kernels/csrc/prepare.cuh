// From router metadata to the per-expert arrays that a CUTLASS grouped GEMM reads.
//
// A grouped GEMM takes, for each expert, a token count, a few pointers and a few strides. All of
// them follow from three int32 arrays that already lie on the device, so they are computed there,
// by one kernel with one thread an expert, and the host never waits. The arithmetic is in functors
// that also run on the host: tests/cuda/host_reference.cu feeds CUTLASS's CPU reference with them.
//
// Nothing here depends on an architecture.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "cutlass/cutlass.h"

namespace hybrid_mxfp8 {

constexpr int kScaleBlock = 32;      // elements along K that share one scale
constexpr int kScaleTileRows = 128;  // rows of one swizzled scale tile
constexpr int kScaleTileCols = 4;    // scale columns of one swizzled scale tile

CUTLASS_HOST_DEVICE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The sizes of a call. `scale_rows` is the row bound of the token scales that were allocated.
struct Problem {
  int num_experts;
  int n;
  int k;
  int num_tokens;
  int64_t scale_rows;

  CUTLASS_HOST_DEVICE int64_t scale_cols() const {
    return round_up(k / kScaleBlock, kScaleTileCols);
  }
};

// The rows of one expert, in the token matrix and in its swizzled scales.
struct ExpertRows {
  int64_t begin;
  int64_t scale_begin;
  int32_t tokens;
};

// Finds the rows of an expert. Offsets written by GroupLayout are always inside the buffers;
// anything else is clamped, and an expert that still does not fit is emptied, so that no metadata,
// however wrong, makes a kernel leave its buffers.
struct ExpertOffsets {
  int32_t const* tokens_per_expert;
  int32_t const* expert_offsets;
  int32_t const* scale_offsets;

  CUTLASS_HOST_DEVICE ExpertRows operator()(Problem const& problem, int expert) const {
    int64_t begin = expert_offsets[expert];
    int64_t scale_begin = scale_offsets[expert];
    int64_t tokens = tokens_per_expert[expert];
    bool begins_inside = begin >= 0 && begin <= problem.num_tokens;
    if (!begins_inside || tokens < 0) {
      return {0, 0, 0};
    }
    tokens = tokens < problem.num_tokens - begin ? tokens : problem.num_tokens - begin;
    bool scales_inside = scale_begin >= 0 && scale_begin % kScaleTileRows == 0 &&
                         scale_begin + round_up(tokens, kScaleTileRows) <= problem.scale_rows;
    if (!scales_inside) {
      return {0, 0, 0};
    }
    return {begin, scale_begin, static_cast<int32_t>(tokens)};
  }
};

// Device pointers to the operands. Scales are swizzled, one 128x4 tile after the other.
template <class Element, class ElementScale, class ElementOut>
struct Operands {
  Element const* weights;             // (E, N, K)
  ElementScale const* weight_scales;  // (E, roundup(N, 128), C)
  Element const* tokens;              // (T, K)
  ElementScale const* token_scales;   // (S, C)
  ElementOut* out;                    // (T, N)
};

// The arrays of one call, an entry an expert. `Gemm` is a GroupedGemm of grouped_gemm_sm100.cuh.
// The ragged mainloop describes the weights once, from the host, and leaves their arrays unused.
template <class Gemm>
struct OperandArrays {
  int32_t* tokens;
  typename Gemm::Element const** weights;
  typename Gemm::ElementScale const** weight_scales;
  typename Gemm::Element const** token_rows;
  typename Gemm::ElementScale const** token_scales;
  typename Gemm::ElementOut** out;
  typename Gemm::WeightStride* weight_stride;
  typename Gemm::TokenStride* token_stride;
  typename Gemm::OutStride* out_stride;
  typename Gemm::ScaleLayout* weight_scale_layout;
  typename Gemm::ScaleLayout* token_scale_layout;
  size_t bytes;

  // Lays the arrays out in a buffer, an arena; over a null pointer it measures the buffer instead.
  static OperandArrays in_arena(void* buffer, int num_experts) {
    constexpr size_t kAlignment = 128;
    OperandArrays arrays{};
    auto place = [&](auto*& array) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(reinterpret_cast<uintptr_t>(buffer) + arrays.bytes);
      arrays.bytes += round_up(sizeof(*array) * static_cast<size_t>(num_experts), kAlignment);
    };
    place(arrays.tokens), place(arrays.token_rows), place(arrays.token_scales);
    place(arrays.out), place(arrays.out_stride);
    if constexpr (!Gemm::kRagged) {
      place(arrays.weights), place(arrays.weight_scales), place(arrays.weight_stride);
      place(arrays.token_stride), place(arrays.weight_scale_layout), place(arrays.token_scale_layout);
    }
    return arrays;
  }
};

// Fills the entries of one expert.
template <class Gemm>
struct PrepareExpert {
  Problem problem;
  ExpertOffsets offsets;
  typename Gemm::Operands operands;
  OperandArrays<Gemm> arrays;

  CUTLASS_HOST_DEVICE void operator()(int expert) const {
    ExpertRows rows = offsets(problem, expert);
    int64_t k = problem.k;
    int64_t n = problem.n;
    arrays.tokens[expert] = rows.tokens;
    arrays.token_rows[expert] = operands.tokens + rows.begin * k;
    arrays.token_scales[expert] = operands.token_scales + rows.scale_begin * problem.scale_cols();
    arrays.out[expert] = operands.out + rows.begin * n;
    arrays.out_stride[expert] = Gemm::out_stride(problem.n);
    if constexpr (!Gemm::kRagged) {
      int64_t weight_scale_rows = round_up(n, kScaleTileRows);
      arrays.weights[expert] = operands.weights + expert * n * k;
      arrays.weight_scales[expert] =
          operands.weight_scales + expert * weight_scale_rows * problem.scale_cols();
      arrays.weight_stride[expert] = Gemm::weight_stride(problem.k);
      arrays.token_stride[expert] = Gemm::token_stride(problem.k);
      arrays.weight_scale_layout[expert] = Gemm::weight_scale_layout(problem.n, rows.tokens, problem.k);
      arrays.token_scale_layout[expert] = Gemm::token_scale_layout(problem.n, rows.tokens, problem.k);
    }
  }
};

// One thread an expert. The GEMM may be launched while this runs (programmatic dependent launch):
// it sets itself up and waits for this grid to end and its writes to be visible.
template <class Prepare>
__global__ void prepare_kernel(__grid_constant__ Prepare const prepare, int num_experts) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  int expert = blockIdx.x * blockDim.x + threadIdx.x;
  if (expert < num_experts) {
    prepare(expert);
  }
}

template <class Gemm>
cudaError_t launch_prepare(PrepareExpert<Gemm> const& prepare, cudaStream_t stream) {
  constexpr int kThreads = 128;
  int num_experts = prepare.problem.num_experts;
  int blocks = (num_experts + kThreads - 1) / kThreads;
  prepare_kernel<<<blocks, kThreads, 0, stream>>>(prepare, num_experts);
  return cudaGetLastError();
}

}  // namespace hybrid_mxfp8
