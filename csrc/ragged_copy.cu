// The CUDA side of ragged_copy.h. Descriptors travel by value in the kernel's parameters, so that
// a launch needs no buffer of its own and no copy to the device.

#include "ragged_copy.h"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace imf {
namespace {

template <uint32_t kCapacity>
struct Batch {
  uint32_t count;
  Segment segments[kCapacity];
};

template <uint32_t kCapacity>
__global__ void __launch_bounds__(kThreads)
    ragged_copy_kernel(const __grid_constant__ Batch<kCapacity> batch) {
  // the last segment that starts at or before this block
  uint32_t low = 0, high = batch.count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (batch.segments[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Segment& segment = batch.segments[low];
  const uint32_t first = (blockIdx.x - segment.first_block) * kUnitsPerBlock + threadIdx.x;
#pragma unroll
  for (uint32_t offset = 0; offset < kUnitsPerBlock; offset += kThreads) {
    if (first + offset < segment.units) {
      copy_unit(segment, first + offset);
    }
  }
}

template <uint32_t kCapacity>
cudaError_t launch(Segment* segments, uint32_t count, cudaStream_t stream) {
  static_assert(sizeof(Batch<kCapacity>) <= 32764, "what a kernel's parameters may hold");
  Batch<kCapacity> batch;
  batch.count = count;
  uint32_t blocks = 0;
  for (uint32_t i = 0; i < count; ++i) {
    batch.segments[i] = segments[i];
    batch.segments[i].first_block = blocks;
    blocks += (segments[i].units + kUnitsPerBlock - 1) / kUnitsPerBlock;
  }
  ragged_copy_kernel<kCapacity><<<blocks, kThreads, 0, stream>>>(batch);
  return cudaGetLastError();
}

}  // namespace

int launch_ragged_copy(Segment* segments, uint32_t count, void* stream) {
  // 4 KB of parameters for a usual request, 32 KB (sm_70 and later) for one of many rows
  constexpr uint32_t kSmall = 48, kLarge = 400;
  auto* on = static_cast<cudaStream_t>(stream);
  while (count > 0) {
    const uint32_t some = std::min(count, kLarge);
    const cudaError_t error =
        some <= kSmall ? launch<kSmall>(segments, some, on) : launch<kLarge>(segments, some, on);
    if (error != cudaSuccess) {
      return error;
    }
    segments += some;
    count -= some;
  }
  return cudaSuccess;
}

}  // namespace imf
