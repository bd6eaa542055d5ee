// From tensors to the segments of ragged_copy.h.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "ragged_copy.h"

namespace imf {

// Copies `sources[i]` (nothing: only pad) into `destinations[i]`, contiguous; see
// imf_kernels/ops/ragged_copy.py for the contract. `kept` holds what the segments point into
// beyond the arguments: contiguous copies of sources with strided inner dimensions.
std::vector<Segment> segments_of(
    const std::vector<at::Tensor>& destinations,
    const std::vector<std::optional<at::Tensor>>& sources,
    const std::vector<double>& pads,
    std::vector<at::Tensor>& kept);

}  // namespace imf
