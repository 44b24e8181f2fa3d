// From the tensors of a call to its sizes: every constraint that, broken, would make a kernel read
// or write outside a buffer or a TMA descriptor fail. Errors name the argument.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/tvm_ffi.h>

#include "cutlass/numeric_types.h"

#include "prepare.cuh"

// Reaches Python as the exception of that name, with the message alone.
#define HYBRID_MXFP8_EXPECT(condition, ErrorKind) \
  if (!(condition)) TVM_FFI_THROW(ErrorKind)

namespace hybrid_mxfp8 {

namespace ffi = tvm::ffi;

constexpr uintptr_t kTmaAlignment = 16;         // of every address that a descriptor holds
constexpr uintptr_t kWorkspaceAlignment = 128;  // TMA descriptors live in the workspace

// The tensors of a call, as Python passes them. e4m3 and e8m0 may come as bytes.
struct Tensors {
  ffi::TensorView x;                  // (T, K) e4m3
  ffi::TensorView x_scales;           // (S, C) e8m0, swizzled
  ffi::TensorView w;                  // (E, N, K) e4m3
  ffi::TensorView w_scales;           // (E, roundup(N, 128), C) e8m0, swizzled
  ffi::TensorView tokens_per_expert;  // (E,) int32
  ffi::TensorView expert_offsets;     // (E + 1,) int32
  ffi::TensorView scale_offsets;      // (E + 1,) int32
  ffi::TensorView out;                // (T, N)
};

inline void check_memory(ffi::TensorView const& tensor, char const* name, DLDevice device, uintptr_t alignment) {
  bool same_device =
      tensor.device().device_type == device.device_type && tensor.device().device_id == device.device_id;
  HYBRID_MXFP8_EXPECT(same_device, ValueError)
      << name << ": expected on the device of x, got device " << tensor.device().device_id;
  HYBRID_MXFP8_EXPECT(tensor.IsContiguous(), ValueError) << name << ": expected a contiguous tensor";
  HYBRID_MXFP8_EXPECT(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0, ValueError)
      << name << ": expected an address that is a multiple of " << alignment << " bytes";
}

inline void check_shape(ffi::TensorView const& tensor, char const* name, std::initializer_list<int64_t> shape) {
  auto listed = [](auto const& extents) {
    std::string text;
    for (int64_t extent : extents) {
      text += (text.empty() ? "" : ", ") + std::to_string(extent);
    }
    return text;
  };
  std::string expected = listed(shape);
  std::string got = listed(tensor.shape());
  HYBRID_MXFP8_EXPECT(expected == got, ValueError)
      << name << ": expected shape (" << expected << "), got (" << got << ")";
}

// Checks every operand against the sizes that x and w imply, and returns those sizes.
template <class ElementOut>
Problem check_operands(Tensors const& t) {
  HYBRID_MXFP8_EXPECT(t.x.ndim() == 2, ValueError) << "x: expected (T, K), got " << t.x.ndim() << " dimensions";
  HYBRID_MXFP8_EXPECT(t.w.ndim() == 3, ValueError) << "w: expected (E, N, K), got " << t.w.ndim() << " dimensions";
  HYBRID_MXFP8_EXPECT(t.x_scales.ndim() == 2, ValueError) << "x scales: expected (S, C)";
  int64_t num_tokens = t.x.size(0);
  int64_t k = t.x.size(1);
  int64_t num_experts = t.w.size(0);
  int64_t n = t.w.size(1);
  int64_t scale_rows = t.x_scales.size(0);

  constexpr int64_t kInt = std::numeric_limits<int32_t>::max();
  constexpr int64_t kOutAlignment = kTmaAlignment / sizeof(ElementOut);
  HYBRID_MXFP8_EXPECT(k > 0 && k % kScaleBlock == 0, ValueError)
      << "x: K must be a positive multiple of " << kScaleBlock << ", got " << k;
  HYBRID_MXFP8_EXPECT(n > 0 && n % kOutAlignment == 0, ValueError)
      << "w: N must be a positive multiple of " << kOutAlignment << " for this out dtype, got " << n;
  HYBRID_MXFP8_EXPECT(num_tokens <= kInt && n <= kInt && k <= kInt && num_experts <= kInt, ValueError)
      << "x, w: each of T, E, N and K must fit in 32 bits";
  // The ragged mainloop multiplies N and K as ints for the stride from one expert's weights to the
  // next (moe_stride_utils.hpp). Its other operands are described for one expert at a time, with no
  // such stride.
  HYBRID_MXFP8_EXPECT(n * k <= kInt, ValueError)
      << "w: N * K must fit in 32 bits, got N = " << n << ", K = " << k;
  Problem problem{static_cast<int>(num_experts), static_cast<int>(n), static_cast<int>(k),
                  static_cast<int>(num_tokens), scale_rows};
  // CUTLASS keeps the scale layout of one expert in 32-bit strides.
  int64_t weight_scale_rows = round_up(n, kScaleTileRows);
  HYBRID_MXFP8_EXPECT(weight_scale_rows * problem.scale_cols() <= kInt, ValueError)
      << "w: the scales of one expert must be below 2 GiB";

  auto check_bytes = [&](ffi::TensorView const& tensor, char const* name, std::initializer_list<int64_t> shape) {
    check_memory(tensor, name, t.x.device(), kTmaAlignment);
    HYBRID_MXFP8_EXPECT(tensor.dtype().bits == 8 && tensor.dtype().lanes == 1, TypeError)
        << name << ": expected 8-bit elements, got " << int(tensor.dtype().bits) << "-bit ones";
    check_shape(tensor, name, shape);
  };
  auto check_int32 = [&](ffi::TensorView const& tensor, char const* name, int64_t extent) {
    check_memory(tensor, name, t.x.device(), sizeof(int32_t));
    HYBRID_MXFP8_EXPECT(tensor.dtype().code == kDLInt && tensor.dtype().bits == 32, TypeError)
        << name << ": expected int32";
    check_shape(tensor, name, {extent});
  };
  check_bytes(t.x, "x", {num_tokens, k});
  check_bytes(t.w, "w", {num_experts, n, k});
  check_bytes(t.x_scales, "x scales", {scale_rows, problem.scale_cols()});
  check_bytes(t.w_scales, "w scales", {num_experts, weight_scale_rows, problem.scale_cols()});
  check_int32(t.tokens_per_expert, "tokens_per_expert", num_experts);
  check_int32(t.expert_offsets, "expert_offsets", num_experts + 1);
  check_int32(t.scale_offsets, "scale_offsets", num_experts + 1);
  check_memory(t.out, "out", t.x.device(), kTmaAlignment);
  constexpr auto kOutCode = cute::is_same_v<ElementOut, cutlass::bfloat16_t> ? kDLBfloat : kDLFloat;
  bool same_type = t.out.dtype().code == kOutCode && t.out.dtype().bits == 8 * sizeof(ElementOut);
  HYBRID_MXFP8_EXPECT(same_type, TypeError) << "out: its dtype is not the one this module was compiled for";
  check_shape(t.out, "out", {num_tokens, n});
  return problem;
}

}  // namespace hybrid_mxfp8
