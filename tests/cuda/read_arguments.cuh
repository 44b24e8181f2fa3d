// Reads Gemm::Arguments back, the way the kernel does: one expert's operands as CuTe tensors.
//
// The references of the tests, host_reference.cu on the CPU and argument_walker.cu on a GPU,
// multiply what these tensors show. They therefore see the pointers, strides, layouts and token
// counts that the SM100 kernel will see, and none of the tensors that those were made from.
#pragma once

#include <vector>

#include "grouped_gemm_sm100.cuh"

namespace hybrid_mxfp8 {

// The arrays behind `args` must be readable where this runs.
template <class Gemm>
struct ExpertOperands {
  using Arguments = typename Gemm::Arguments;

  int n;
  int tokens;
  int k;
  typename Gemm::Element const* a;
  typename Gemm::Element const* b;
  typename Gemm::ElementScale const* sfa;
  typename Gemm::ElementScale const* sfb;
  typename Gemm::ElementOut* d;
  typename Gemm::WeightStride stride_a;
  typename Gemm::TokenStride stride_b;
  typename Gemm::OutStride stride_d;
  typename Gemm::ScaleLayout layout_sfa;
  typename Gemm::ScaleLayout layout_sfb;

  CUTLASS_HOST_DEVICE static ExpertOperands read(Arguments const& args, int expert) {
    ExpertOperands self{};
    auto shape = args.problem_shape.get_problem_shape(expert);
    self.n = cute::get<0>(shape);
    self.tokens = cute::get<1>(shape);
    self.k = cute::get<2>(shape);
    self.b = args.mainloop.ptr_B[expert];
    self.sfb = args.mainloop.ptr_SFB[expert];
    self.d = args.epilogue.ptr_D[expert];
    self.stride_d = args.epilogue.dD[expert];
#if HYBRID_MXFP8_RAGGED
    // The mainloop lays the experts' weights out itself: packed, the expert as the last coordinate.
    auto all_experts = cute::make_shape(self.n, self.tokens, self.k, args.problem_shape.groups());
    self.stride_a = cutlass::make_internal_packed_stride(typename Gemm::WeightStride{},
                                                         cute::select<0, 2, 3>(all_experts));
    auto layout_sfa = Gemm::ScaleConfig::tile_atom_to_shape_SFA(all_experts);
    self.a = args.mainloop.ptr_A + expert * int64_t(cute::get<2>(self.stride_a));
    self.sfa = args.mainloop.ptr_SFA + layout_sfa(0, 0, expert);
    self.stride_b = Gemm::token_stride(self.k);
    self.layout_sfa = Gemm::weight_scale_layout(self.n, self.tokens, self.k);
    self.layout_sfb = Gemm::token_scale_layout(self.n, self.tokens, self.k);
#else
    self.a = args.mainloop.ptr_A[expert];
    self.sfa = args.mainloop.ptr_SFA[expert];
    self.stride_a = args.mainloop.dA[expert];
    self.stride_b = args.mainloop.dB[expert];
    self.layout_sfa = args.mainloop.layout_SFA[expert];
    self.layout_sfb = args.mainloop.layout_SFB[expert];
#endif
    return self;
  }

  CUTLASS_HOST_DEVICE auto tensor_a() const {
    return cute::make_tensor(a, cute::make_layout(cute::make_shape(n, k, 1), stride_a));
  }
  CUTLASS_HOST_DEVICE auto tensor_b() const {
    return cute::make_tensor(b, cute::make_layout(cute::make_shape(tokens, k, 1), stride_b));
  }
  CUTLASS_HOST_DEVICE auto tensor_d() const {
    return cute::make_tensor(d, cute::make_layout(cute::make_shape(n, tokens, 1), stride_d));
  }
  CUTLASS_HOST_DEVICE auto tensor_sfa() const { return cute::make_tensor(sfa, layout_sfa); }
  CUTLASS_HOST_DEVICE auto tensor_sfb() const { return cute::make_tensor(sfb, layout_sfb); }
};

// A call's workspace on the CPU, aligned as the launch demands it.
struct HostWorkspace {
  explicit HostWorkspace(size_t bytes) : memory(bytes + kAlignment) {}
  void* data() { return reinterpret_cast<void*>(round_up(reinterpret_cast<int64_t>(memory.data()), kAlignment)); }

  static constexpr int64_t kAlignment = 128;
  std::vector<char> memory;
};

}  // namespace hybrid_mxfp8
