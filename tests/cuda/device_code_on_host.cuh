// Included before all else: makes functions of CUTLASS's block-scaled mainloops that only devices
// have run on the host, too, as far as load_init and what it calls.
#pragma once

#include "cute/config.hpp"
#pragma push_macro("CUTE_DEVICE")
#undef CUTE_DEVICE
#define CUTE_DEVICE CUTE_HOST_DEVICE
#include "cute/tensor.hpp"
//
#include "cute/atom/copy_traits_sm90_tma.hpp"
#pragma pop_macro("CUTE_DEVICE")

#include "cutlass/arch/grid_dependency_control.h"
#include "cutlass/arch/memory.h"
#include "cutlass/cutlass.h"
#include "cutlass/detail/collective.hpp"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/detail/sm100_tmem_helper.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/gemm.h"
#include "cutlass/numeric_conversion.h"
#include "cutlass/pipeline/pipeline.hpp"
#include "cutlass/trace.h"
#include "cutlass/version.h"

#pragma push_macro("CUTLASS_DEVICE")
#undef CUTLASS_DEVICE
#define CUTLASS_DEVICE CUTLASS_HOST_DEVICE
#define __syncwarp()
#if CUTLASS_VERSION >= 440
#include "cutlass/gemm/collective/sm100_blockscaled_mma_array_warpspecialized_rcggemm.hpp"
#else
#include "cutlass/gemm/collective/sm100_blockscaled_mma_array_warpspecialized.hpp"
#endif
#undef __syncwarp
#pragma pop_macro("CUTLASS_DEVICE")
