// Many copies between ragged and padded tensors as one list of plain descriptors. The arithmetic
// here is what the CUDA kernel and its CPU twin share.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define IMF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IMF_HOST_DEVICE inline
#endif

namespace imf {

// One copy, in units of `unit` bytes (1 to 16, a power of two, never less than an element). The
// destination is contiguous, (rows, frames, width); the source has its own strides, and where it
// has no row or frame the destination takes the pad.
struct Segment {
  const char* source;  // null: nothing but pad
  char* destination;
  uint64_t pad;  // the padding element, repeated over 8 bytes
  int64_t row_stride;  // of the source, in bytes
  int64_t frame_stride;
  uint32_t source_rows;
  uint32_t source_frames;
  uint32_t frames;
  uint32_t width;
  uint32_t unit;
  uint32_t units;
  uint32_t first_block;  // of the launch, among the blocks of all segments
};

struct alignas(16) Unit16 {
  uint64_t low, high;
};

// Where unit `i` of the destination comes from; null: the pad.
IMF_HOST_DEVICE const char* source_of(const Segment& segment, uint32_t i) {
  const uint32_t frame_of_all = i / segment.width;
  const uint32_t row = frame_of_all / segment.frames;
  const uint32_t frame = frame_of_all - row * segment.frames;
  if (segment.source == nullptr || row >= segment.source_rows ||
      frame >= segment.source_frames) {
    return nullptr;
  }
  return segment.source + row * segment.row_stride + frame * segment.frame_stride +
         static_cast<int64_t>(i - frame_of_all * segment.width) * segment.unit;
}

template <typename Type>
IMF_HOST_DEVICE void copy_as(const Segment& segment, uint32_t i, Type pad) {
  const char* source = source_of(segment, i);
  reinterpret_cast<Type*>(segment.destination)[i] =
      source == nullptr ? pad : *reinterpret_cast<const Type*>(source);
}

IMF_HOST_DEVICE void copy_unit(const Segment& segment, uint32_t i) {
  switch (segment.unit) {
    case 16:
      return copy_as(segment, i, Unit16{segment.pad, segment.pad});
    case 8:
      return copy_as(segment, i, segment.pad);
    case 4:
      return copy_as(segment, i, static_cast<uint32_t>(segment.pad));
    case 2:
      return copy_as(segment, i, static_cast<uint16_t>(segment.pad));
    default:
      return copy_as(segment, i, static_cast<uint8_t>(segment.pad));
  }
}

// Units that one block of the CUDA kernel copies.
constexpr uint32_t kThreads = 256;
constexpr uint32_t kUnitsPerBlock = 4 * kThreads;

// Copies the segments on a CUDA stream (`stream` is a cudaStream_t): one launch, or a few where
// there are more than a kernel's parameters can hold. Returns a cudaError_t.
int launch_ragged_copy(Segment* segments, uint32_t count, void* stream);

}  // namespace imf
