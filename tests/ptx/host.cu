// The host side of every configuration of a mainloop, on a machine without a GPU or a driver.
//
// Compiled with CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL, CUTLASS encodes TMA descriptors by calling
// cuTensorMapEncodeTiled, which is defined here and writes the emulator's own format (see tensormap.py). No kernel
// is instantiated, so all configurations fit one module.
#include <cstring>

#include <cuda.h>
#include <tvm/ffi/tvm_ffi.h>

#include "call.cuh"

namespace {

// A descriptor is 128 opaque bytes to everybody but TMA, except that the host may clear bit 21 of its second word
// (a workaround for a driver's fault): that bit is not used here.
struct TensorMap {
  uint64_t address;
  uint32_t magic;  // bits 0 to 15; bit 21 of the word stays clear
  uint8_t type, rank, swizzle, fill;
  uint32_t dims[5];
  uint32_t box[5];
  uint64_t strides[4];  // bytes, of dimensions 1 to 4
  uint16_t element_strides[5];
  uint8_t interleave;
  uint8_t unused[29];
};
static_assert(sizeof(TensorMap) == 128 && alignof(TensorMap) <= 64);

constexpr uint32_t kMagic = 0x5AA5;

}  // namespace

extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                                   void* address, cuuint64_t const* dims, cuuint64_t const* strides,
                                                   cuuint32_t const* box, cuuint32_t const* element_strides,
                                                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap made{};
  made.address = reinterpret_cast<uint64_t>(address);
  made.magic = kMagic;
  made.type = static_cast<uint8_t>(type);
  made.rank = static_cast<uint8_t>(rank);
  made.swizzle = static_cast<uint8_t>(swizzle);
  made.fill = static_cast<uint8_t>(fill);
  made.interleave = static_cast<uint8_t>(interleave);
  if (rank < 1 || rank > 5) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (unsigned d = 0; d < rank; ++d) {
    if (dims[d] == 0 || dims[d] > (uint64_t(1) << 32) || box[d] == 0 || box[d] > 256) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    made.dims[d] = static_cast<uint32_t>(dims[d]);
    made.box[d] = box[d];
    made.element_strides[d] = static_cast<uint16_t>(element_strides[d]);
    if (d > 0) {
      made.strides[d - 1] = strides[d - 1];
    }
  }
  std::memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

namespace hybrid_mxfp8 {
namespace {

Launch make_launch(int64_t cta_group, int64_t sm_count, int64_t cluster_m, int64_t cluster_n) {
  Launch launch{};
  launch.sm_count = static_cast<int>(sm_count);
  launch.cluster = dim3(cluster_m, cluster_n, 1);
  launch.cluster_fallback = dim3(cta_group, 1, 1);
  return launch;
}

struct Shape {
  int64_t experts, n, k, tokens, sm_count, cluster_m, cluster_n;
};

template <class Selected, int CtaGroup>
int64_t workspace_of(Shape const& s) {
  Problem problem{static_cast<int>(s.experts), static_cast<int>(s.n), static_cast<int>(s.k),
                  static_cast<int>(s.tokens), 0};
  return Selected::workspace_size(problem, make_launch(CtaGroup, s.sm_count, s.cluster_m, s.cluster_n));
}

// What the driver would be given: `params` and `prepare` receive the two kernels' parameters, `facts` their sizes and
// the launch: bytes of params, grid x y z, threads, cluster x y, shared memory, bytes of prepare, bytes of the
// per-expert arrays.
template <class Selected, int CtaGroup>
void describe_one(Tensors const& tensors, ffi::TensorView workspace, Shape const& s, ffi::TensorView params_out,
                  ffi::TensorView prepare_out, ffi::TensorView facts_out) {
  Call<Selected> call(tensors, workspace.data_ptr(), make_launch(CtaGroup, s.sm_count, s.cluster_m, s.cluster_n));
  call.check_workspace(workspace, tensors.x.device());
  HYBRID_MXFP8_EXPECT(Selected::Gemm::can_implement(call.args) == cutlass::Status::kSuccess, ValueError)
      << "CUTLASS does not take this call";
  using Kernel = typename Selected::Kernel;
  auto prepare = call.prepare();
  auto params = call.params(workspace.data_ptr());
  dim3 grid = Kernel::get_grid_shape(params);
  auto cluster = cutlass::detail::select_cluster_shape(typename Kernel::ClusterShape{}, params.hw_info.cluster_shape);
  int64_t facts[] = {static_cast<int64_t>(sizeof params),
                     grid.x, grid.y, grid.z,
                     static_cast<int64_t>(Kernel::get_block_shape().x),
                     static_cast<int64_t>(cute::get<0>(cluster)), static_cast<int64_t>(cute::get<1>(cluster)),
                     static_cast<int64_t>(Kernel::SharedStorageSize),
                     static_cast<int64_t>(sizeof prepare),
                     static_cast<int64_t>(call.arrays.bytes)};
  HYBRID_MXFP8_EXPECT(params_out.numel() >= int64_t(sizeof params) && prepare_out.numel() >= int64_t(sizeof prepare),
                      ValueError) << "params: " << sizeof params << " and " << sizeof prepare << " bytes are needed";
  std::memcpy(params_out.data_ptr(), &params, sizeof params);
  std::memcpy(prepare_out.data_ptr(), &prepare, sizeof prepare);
  std::memcpy(facts_out.data_ptr(), facts, sizeof facts);
}

// Calls `f` with the configuration as a type.
template <class F>
auto select(int64_t cta_group, int64_t token_tile, int64_t out_type, F f) {
#define HYBRID_MXFP8_CASE(group, tile, number, type)                        \
  if (cta_group == group && token_tile == tile && out_type == number) {     \
    return f.template operator()<GroupedGemm<Config<group, tile, type>>, group>();    \
  }
#define HYBRID_MXFP8_TILES(number, type)                                            \
  HYBRID_MXFP8_CASE(1, 64, number, type) HYBRID_MXFP8_CASE(1, 128, number, type)    \
  HYBRID_MXFP8_CASE(1, 192, number, type) HYBRID_MXFP8_CASE(1, 256, number, type)   \
  HYBRID_MXFP8_CASE(2, 64, number, type) HYBRID_MXFP8_CASE(2, 128, number, type)    \
  HYBRID_MXFP8_CASE(2, 192, number, type) HYBRID_MXFP8_CASE(2, 256, number, type)
#ifdef HYBRID_MXFP8_ONLY_GROUP  // for one configuration, which compiles in a fifth of the time
  HYBRID_MXFP8_CASE(HYBRID_MXFP8_ONLY_GROUP, HYBRID_MXFP8_ONLY_TILE, HYBRID_MXFP8_ONLY_NUMBER, HYBRID_MXFP8_ONLY_OUT)
#else
  HYBRID_MXFP8_TILES(0, cutlass::bfloat16_t)
  HYBRID_MXFP8_TILES(1, cutlass::half_t)
  HYBRID_MXFP8_TILES(2, float)
#endif
  TVM_FFI_THROW(ValueError) << "no such configuration: " << cta_group << ", " << token_tile << ", " << out_type;
}

struct Workspace {
  Shape shape;
  template <class Selected, int CtaGroup>
  int64_t operator()() const { return workspace_of<Selected, CtaGroup>(shape); }
};

int64_t workspace_size(int64_t cta_group, int64_t token_tile, int64_t out_type, int64_t experts, int64_t n, int64_t k,
                       int64_t tokens, int64_t sm_count, int64_t cluster_m, int64_t cluster_n) {
  return select(cta_group, token_tile, out_type, Workspace{{experts, n, k, tokens, sm_count, cluster_m, cluster_n}});
}

struct Describe {
  Tensors const& tensors;
  ffi::TensorView workspace;
  Shape shape;
  ffi::TensorView params, prepare, facts;
  template <class Selected, int CtaGroup>
  int64_t operator()() const {
    describe_one<Selected, CtaGroup>(tensors, workspace, shape, params, prepare, facts);
    return 0;
  }
};

void describe(ffi::TensorView x, ffi::TensorView x_scales, ffi::TensorView w, ffi::TensorView w_scales,
              ffi::TensorView tokens_per_expert, ffi::TensorView expert_offsets, ffi::TensorView scale_offsets,
              ffi::TensorView out, ffi::TensorView workspace, int64_t cta_group, int64_t token_tile, int64_t out_type,
              int64_t sm_count, int64_t cluster_m, int64_t cluster_n, ffi::TensorView params, ffi::TensorView prepare,
              ffi::TensorView facts) {
  Tensors tensors{x, x_scales, w, w_scales, tokens_per_expert, expert_offsets, scale_offsets, out};
  Shape shape{0, 0, 0, 0, sm_count, cluster_m, cluster_n};
  select(cta_group, token_tile, out_type, Describe{tensors, workspace, shape, params, prepare, facts});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_size, workspace_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(describe, describe);

}  // namespace hybrid_mxfp8
