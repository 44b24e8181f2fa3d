// From tvm-ffi tensors to Problem, Operands and ExpertOffsets: every constraint that, broken, would make
// a kernel read or write outside a buffer or a TMA descriptor fail. Errors name the argument.
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

inline void check_tensor(ffi::TensorView const& tensor, char const* name, DLDevice device,
                         uintptr_t alignment = kWorkspaceAlignment) {
  bool same_device =
      tensor.device().device_type == device.device_type && tensor.device().device_id == device.device_id;
  HYBRID_MXFP8_EXPECT(same_device, ValueError)
      << name << ": expected on the device of x, got device " << tensor.device().device_id;
  HYBRID_MXFP8_EXPECT(tensor.IsContiguous(), ValueError) << name << ": expected a contiguous tensor";
  HYBRID_MXFP8_EXPECT(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0, ValueError)
      << name << ": expected an address that is a multiple of " << alignment << " bytes";
}

inline void check_shape(ffi::TensorView const& tensor, char const* name, std::initializer_list<int64_t> shape) {
  bool same = tensor.ndim() == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t extent : shape) {
    same = same && tensor.size(i++) == extent;
  }
  if (same) {
    return;
  }
  std::string expected;
  std::string got;
  for (int64_t extent : shape) {
    expected += (expected.empty() ? "" : ", ") + std::to_string(extent);
  }
  for (int d = 0; d < tensor.ndim(); ++d) {
    got += (got.empty() ? "" : ", ") + std::to_string(tensor.size(d));
  }
  TVM_FFI_THROW(ValueError) << name << ": expected shape (" << expected << "), got (" << got << ")";
}

// e4m3 and e8m0 may come as bytes: not every torch exports them through DLPack.
inline void check_bytes(ffi::TensorView const& tensor, char const* name) {
  HYBRID_MXFP8_EXPECT(tensor.dtype().bits == 8 && tensor.dtype().lanes == 1, TypeError)
      << name << ": expected 8-bit elements, got " << int(tensor.dtype().bits) << "-bit ones";
}

inline void check_int32(ffi::TensorView const& tensor, char const* name) {
  HYBRID_MXFP8_EXPECT(tensor.dtype().code == kDLInt && tensor.dtype().bits == 32, TypeError)
      << name << ": expected int32";
}

template <class ElementOut>
constexpr DLDataTypeCode out_type_code() {
  return cute::is_same_v<ElementOut, cutlass::bfloat16_t> ? kDLBfloat : kDLFloat;
}

// Checks every operand against the sizes that x and w imply, and returns those sizes.
template <class ElementOut>
Problem check_operands(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
                       ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets,
                       ffi::TensorView scale_offsets, ffi::TensorView out) {
  HYBRID_MXFP8_EXPECT(x.ndim() == 2, ValueError) << "x: expected (T, K), got " << x.ndim() << " dimensions";
  HYBRID_MXFP8_EXPECT(w.ndim() == 3, ValueError) << "w: expected (E, N, K), got " << w.ndim() << " dimensions";
  HYBRID_MXFP8_EXPECT(x_scales.ndim() == 2, ValueError) << "x scales: expected (S, C)";
  int64_t num_tokens = x.size(0);
  int64_t k = x.size(1);
  int64_t num_experts = w.size(0);
  int64_t n = w.size(1);
  int64_t scale_rows = x_scales.size(0);

  constexpr int64_t kInt = std::numeric_limits<int32_t>::max();
  constexpr int64_t kOutAlignment = kTmaAlignment / sizeof(ElementOut);
  HYBRID_MXFP8_EXPECT(k > 0 && k % kScaleBlock == 0, ValueError)
      << "x: K must be a positive multiple of " << kScaleBlock << ", got " << k;
  HYBRID_MXFP8_EXPECT(n > 0 && n % kOutAlignment == 0, ValueError)
      << "w: N must be a positive multiple of " << kOutAlignment << " for this out dtype, got " << n;
  HYBRID_MXFP8_EXPECT(num_tokens <= kInt && n <= kInt && k <= kInt && num_experts <= kInt, ValueError)
      << "x, w: each of T, E, N and K must fit in 32 bits";

  // The ragged mainloop multiplies N and K as ints for the stride from one expert's weights to the next
  // (moe_stride_utils.hpp). Its other operands are described for one expert at a time, with no such stride.
  HYBRID_MXFP8_EXPECT(n * k <= kInt, ValueError)
      << "w: N * K must fit in 32 bits, got N = " << n << ", K = " << k;

  Problem problem{static_cast<int>(num_experts), static_cast<int>(n), static_cast<int>(k),
                  static_cast<int>(num_tokens), scale_rows};
  // CUTLASS keeps the scale layout of one expert in 32-bit strides.
  HYBRID_MXFP8_EXPECT(round_up(n, kScaleTileRows) * problem.scale_cols() <= kInt, ValueError)
      << "w: the scales of one expert must be below 2 GiB";

  DLDevice device = x.device();
  check_tensor(x, "x", device, kTmaAlignment);
  check_tensor(x_scales, "x scales", device, kTmaAlignment);
  check_tensor(w, "w", device, kTmaAlignment);
  check_tensor(w_scales, "w scales", device, kTmaAlignment);
  check_tensor(out, "out", device, kTmaAlignment);
  check_tensor(tokens_per_expert, "tokens_per_expert", device, sizeof(int32_t));
  check_tensor(expert_offsets, "expert_offsets", device, sizeof(int32_t));
  check_tensor(scale_offsets, "scale_offsets", device, sizeof(int32_t));

  check_bytes(x, "x");
  check_bytes(x_scales, "x scales");
  check_bytes(w, "w");
  check_bytes(w_scales, "w scales");
  check_int32(tokens_per_expert, "tokens_per_expert");
  check_int32(expert_offsets, "expert_offsets");
  check_int32(scale_offsets, "scale_offsets");
  bool same_type = out.dtype().code == out_type_code<ElementOut>() && out.dtype().bits == 8 * sizeof(ElementOut);
  HYBRID_MXFP8_EXPECT(same_type, TypeError) << "out: its dtype is not the one this module was compiled for";

  check_shape(w, "w", {num_experts, n, k});
  check_shape(w_scales, "w scales", {num_experts, round_up(n, kScaleTileRows), problem.scale_cols()});
  check_shape(x_scales, "x scales", {scale_rows, problem.scale_cols()});
  check_shape(tokens_per_expert, "tokens_per_expert", {num_experts});
  check_shape(expert_offsets, "expert_offsets", {num_experts + 1});
  check_shape(scale_offsets, "scale_offsets", {num_experts + 1});
  check_shape(out, "out", {num_tokens, n});
  return problem;
}

}  // namespace hybrid_mxfp8
