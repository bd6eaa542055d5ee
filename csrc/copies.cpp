// Plans ragged copies, and runs them on the CPU: the twin of ragged_copy.cu.

#include "copies.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

namespace imf {
namespace {

using at::Tensor;

uint64_t repeated(const Tensor& like, double value) {
  uint64_t pattern = 0;
  AT_DISPATCH_ALL_TYPES_AND3(
      at::kBFloat16, at::kHalf, at::kBool, like.scalar_type(), "ragged_copy", [&] {
        const auto element = static_cast<scalar_t>(value);
        for (size_t at = 0; at < sizeof(pattern); at += sizeof(element)) {
          std::memcpy(reinterpret_cast<char*>(&pattern) + at, &element, sizeof(element));
        }
      });
  return pattern;
}

// Bytes of the dimensions from the third on, which both sides share and which lie side by side.
int64_t inner_bytes(const Tensor& tensor) {
  int64_t bytes = tensor.element_size();
  for (int64_t dim = 2; dim < tensor.dim(); ++dim) {
    bytes *= tensor.size(dim);
  }
  return bytes;
}

bool inner_contiguous(const Tensor& tensor) {
  int64_t stride = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= 2; --dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != stride) {
      return false;
    }
    stride *= tensor.size(dim);
  }
  return true;
}

int64_t size_or_one(const Tensor& tensor, int64_t dim) {
  return dim < tensor.dim() ? tensor.size(dim) : 1;
}

void check(const Tensor& destination, const Tensor& source) {
  TORCH_CHECK_TYPE(
      source.scalar_type() == destination.scalar_type(), "source: expected ",
      destination.scalar_type(), ", got ", source.scalar_type());
  TORCH_CHECK_VALUE(
      source.device() == destination.device(), "source: expected a tensor on ",
      destination.device(), ", got one on ", source.device());
  bool fits = source.dim() == destination.dim();
  for (int64_t dim = 2; fits && dim < source.dim(); ++dim) {
    fits = source.size(dim) == destination.size(dim);
  }
  TORCH_CHECK_VALUE(
      fits, "source: expected the destination's ", destination.sizes(),
      " up to the first two dimensions, got ", source.sizes());
}

uint32_t narrow(int64_t value) {
  TORCH_CHECK_VALUE(
      value <= std::numeric_limits<uint32_t>::max() / 2,
      "destination: expected fewer than 2^31 units, got ", value);
  return static_cast<uint32_t>(value);
}

// The largest unit that divides both addresses, every stride in use and the row of units.
uint32_t unit_of(uint64_t bits) {
  uint32_t unit = 16;
  while (bits % unit != 0) {
    unit /= 2;
  }
  return unit;
}

}  // namespace

std::vector<Segment> segments_of(
    const std::vector<Tensor>& destinations,
    const std::vector<std::optional<Tensor>>& sources,
    const std::vector<double>& pads,
    std::vector<Tensor>& kept) {
  TORCH_CHECK_VALUE(
      sources.size() == destinations.size() && pads.size() == destinations.size(),
      "sources, pads: expected ", destinations.size(), " each, got ", sources.size(), " and ",
      pads.size());
  std::vector<Segment> segments;
  segments.reserve(destinations.size());
  for (size_t i = 0; i < destinations.size(); ++i) {
    const Tensor& destination = destinations[i];
    TORCH_CHECK_VALUE(
        destination.dim() >= 1 && destination.is_contiguous(),
        "destination: expected a contiguous tensor of one dimension or more, got sizes ",
        destination.sizes(), ", strides ", destination.strides());
    if (destination.numel() == 0) {
      continue;
    }
    Segment segment{};
    segment.destination = static_cast<char*>(destination.mutable_data_ptr());
    segment.pad = repeated(destination, pads[i]);
    segment.frames = narrow(size_or_one(destination, 1));
    const int64_t bytes = inner_bytes(destination);
    uint64_t bits = reinterpret_cast<uintptr_t>(segment.destination) | bytes;
    if (sources[i] && sources[i]->numel() > 0) {
      check(destination, *sources[i]);
      Tensor source = *sources[i];
      if (!inner_contiguous(source)) {
        kept.push_back(source = source.contiguous());
      }
      segment.source = static_cast<const char*>(source.const_data_ptr());
      segment.source_rows = narrow(source.size(0));
      segment.source_frames = narrow(size_or_one(source, 1));
      segment.row_stride = source.stride(0) * source.element_size();
      segment.frame_stride = source.dim() > 1 ? source.stride(1) * source.element_size() : 0;
      bits |= reinterpret_cast<uintptr_t>(segment.source);
      // one row or frame has no stride that counts
      bits |= segment.source_rows > 1 ? segment.row_stride : 0;
      bits |= segment.source_frames > 1 ? segment.frame_stride : 0;
    }
    segment.unit = unit_of(bits);
    segment.width = narrow(bytes / segment.unit);
    segment.units = narrow(destination.numel() * destination.element_size() / segment.unit);
    segments.push_back(segment);
  }
  return segments;
}

namespace {

void ragged_copy_cpu(
    const std::vector<Tensor>& destinations,
    const std::vector<std::optional<Tensor>>& sources,
    const std::vector<double>& pads) {
  std::vector<Tensor> kept;
  for (const Segment& segment : segments_of(destinations, sources, pads, kept)) {
    for (uint32_t i = 0; i < segment.units; ++i) {
      copy_unit(segment, i);
    }
  }
}

}  // namespace
}  // namespace imf

TORCH_LIBRARY_FRAGMENT(imf_kernels, m) {
  m.def("ragged_copy(Tensor(a!)[] destinations, Tensor?[] sources, float[] pads) -> ()");
}

TORCH_LIBRARY_IMPL(imf_kernels, CPU, m) {
  m.impl("ragged_copy", [](at::TensorList destinations,
                           const c10::List<std::optional<at::Tensor>>& sources,
                           c10::ArrayRef<double> pads) {
    std::vector<std::optional<at::Tensor>> given;
    for (size_t i = 0; i < sources.size(); ++i) {
      given.push_back(sources.get(i));
    }
    imf::ragged_copy_cpu(destinations.vec(), given, pads.vec());
  });
}
