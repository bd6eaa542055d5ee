// Gated residual, LayerNorm and modulation of float32 frames on the CPU, in one pass over memory,
// and its backward. The specification is in imf_kernels/ops/modulated_layer_norm.py.
//
//   x' = x + gate h,   y = (x' - mean) / sqrt(var + eps) (1 + scale) + shift
//
// Sums over frames are made per chunk of a row and then in the chunks' order: the result does not
// depend on the number of threads. Autograd-free, as all operators of this extension.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "multiversion.h"

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;   // partial sums of a reduction: one AVX-512 register
constexpr int64_t kFrames = 32;  // frames of a chunk

struct Modulation {
  const float* data = nullptr;
  int64_t stride = 0;  // 0: one for all rows

  const float* at(int64_t row) const { return data ? data + row * stride : nullptr; }
};

Modulation modulation(const std::optional<Tensor>& tensor) {
  if (!tensor) {
    return {};
  }
  TORCH_CHECK(tensor->stride(1) == 1 || tensor->size(1) == 1, "modulation: unit stride along D");
  return {tensor->const_data_ptr<float>(), tensor->size(0) > 1 ? tensor->stride(0) : 0};
}

const float* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

std::optional<Tensor> int32(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(tensor->to(at::kInt).contiguous()) : std::nullopt;
}

// sum_i term(i) over 0 <= i < n, in kLanes interleaved partial sums.
template <typename Term>
IMF_INLINE float lane_sum(int64_t n, const Term& term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      lanes[k] += term(i + k);
    }
  }
  for (int64_t k = 0; i + k < n; ++k) {
    lanes[k] += term(i + k);
  }
  float sum = 0.0f;
  for (const float lane : lanes) {
    sum += lane;
  }
  return sum;
}

IMF_INLINE float inverse_deviation(const float* x, float mean, float eps, int64_t dim) {
  const float squares = lane_sum(dim, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  return 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
}

IMF_MULTIVERSION void normalise(
    float* __restrict__ y, const float* __restrict__ x, const float* __restrict__ shift,
    const float* __restrict__ scale, float eps, int64_t dim) {
  const float mean = lane_sum(dim, [&](int64_t i) { return x[i]; }) / static_cast<float>(dim);
  const float rstd = inverse_deviation(x, mean, eps, dim);
  for (int64_t i = 0; i < dim; ++i) {
    y[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
  }
}

IMF_MULTIVERSION void add_gated(
    float* __restrict__ out, const float* __restrict__ x, const float* __restrict__ h,
    const float* __restrict__ gate, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) {
    out[i] = x[i] + gate[i] * h[i];
  }
}

std::tuple<Tensor, Tensor> modulated_layer_norm(
    const Tensor& x, const std::optional<Tensor>& h, const std::optional<Tensor>& gate,
    const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& index, double eps) {
  const int64_t frames = x.size(0);
  const int64_t dim = x.size(1);
  Tensor x_out = at::empty(h ? x.sizes() : at::IntArrayRef{0}, x.options());
  Tensor y = at::empty(x.sizes(), x.options());
  const Modulation gates = modulation(gate);
  const Modulation shifts = modulation(shift);
  const Modulation scales = modulation(scale);
  const auto rows = int32(index);
  const int32_t* row_of = rows ? rows->const_data_ptr<int32_t>() : nullptr;
  const float* p_x = x.const_data_ptr<float>();
  const float* p_h = data(h);
  float* p_out = x_out.mutable_data_ptr<float>();
  float* p_y = y.mutable_data_ptr<float>();

  at::parallel_for(0, frames, kFrames, [&](int64_t begin, int64_t end) {
    for (int64_t frame = begin; frame < end; ++frame) {
      const int64_t row = row_of ? row_of[frame] : 0;
      const int64_t o = frame * dim;
      if (row < 0) {
        std::fill_n(p_y + o, dim, 0.0f);
        if (p_h) {
          std::fill_n(p_out + o, dim, 0.0f);
        }
        continue;
      }
      if (p_h) {
        add_gated(p_out + o, p_x + o, p_h + o, gates.at(row), dim);
      }
      const float* input = p_h ? p_out + o : p_x + o;
      normalise(p_y + o, input, shifts.at(row), scales.at(row), static_cast<float>(eps), dim);
    }
  });
  return {x_out, y};
}

// One frame of the backward; sums are those of the frame's chunk: shift, scale, then gate.
IMF_MULTIVERSION void frame_backward(
    float* __restrict__ grad_x, float* __restrict__ grad_h, float* __restrict__ sums,
    const float* __restrict__ grad_out, const float* __restrict__ grad_y,
    const float* __restrict__ x, const float* __restrict__ h, const float* __restrict__ gate,
    const float* __restrict__ scale, float eps, int64_t dim) {
  const float width = static_cast<float>(dim);
  const float mean = lane_sum(dim, [&](int64_t i) { return x[i]; }) / width;
  const float rstd = inverse_deviation(x, mean, eps, dim);
  const auto g = [&](int64_t i) { return grad_y[i] * (1.0f + scale[i]); };
  const auto norm = [&](int64_t i) { return (x[i] - mean) * rstd; };
  const float mean_g = lane_sum(dim, g) / width;
  const float mean_g_norm = lane_sum(dim, [&](int64_t i) { return g(i) * norm(i); }) / width;
  for (int64_t i = 0; i < dim; ++i) {
    sums[i] += grad_y[i];
    sums[dim + i] += grad_y[i] * norm(i);
    grad_x[i] = (g(i) - mean_g - norm(i) * mean_g_norm) * rstd;
  }
  if (h) {
    for (int64_t i = 0; i < dim; ++i) {
      grad_x[i] += grad_out[i];
      grad_h[i] = grad_x[i] * gate[i];
      sums[2 * dim + i] += grad_x[i] * h[i];
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward(
    const Tensor& grad_out, const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& h,
    const std::optional<Tensor>& gate, const Tensor& scale, const std::optional<Tensor>& starts,
    const std::optional<Tensor>& lengths, double eps) {
  const int64_t frames = x.size(0);
  const int64_t dim = x.size(1);
  const auto first = int32(starts);
  const auto length = int32(lengths);
  const int64_t rows = length ? length->numel() : 1;
  const int64_t parts = h ? 3 : 2;
  Tensor grad_x = first ? at::zeros(x.sizes(), x.options()) : at::empty(x.sizes(), x.options());
  Tensor grad_h = !h ? at::empty({0}, x.options())
      : first        ? at::zeros(x.sizes(), x.options())
                     : at::empty(x.sizes(), x.options());

  // Chunk c of all chunks is frames [begin, end) of one row.
  struct Chunk {
    int64_t row, begin, end;
  };
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = first ? first->const_data_ptr<int32_t>()[row] : 0;
    const int64_t end = start + (length ? length->const_data_ptr<int32_t>()[row] : frames);
    for (int64_t begin = start; begin < end; begin += kFrames) {
      chunks.push_back({row, begin, std::min(begin + kFrames, end)});
    }
  }
  const auto count = static_cast<int64_t>(chunks.size());
  Tensor partials = at::zeros({count, parts, dim}, x.options());
  const Modulation gates = modulation(gate);
  const Modulation scales = modulation(scale);
  const float* p_grad_out = grad_out.const_data_ptr<float>();
  const float* p_grad_y = grad_y.const_data_ptr<float>();
  const float* p_x = x.const_data_ptr<float>();
  const float* p_h = data(h);
  float* p_grad_x = grad_x.mutable_data_ptr<float>();
  float* p_grad_h = h ? grad_h.mutable_data_ptr<float>() : nullptr;
  float* p_partials = partials.mutable_data_ptr<float>();

  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const auto& [row, first_frame, last_frame] = chunks[c];
      for (int64_t frame = first_frame; frame < last_frame; ++frame) {
        const int64_t o = frame * dim;
        frame_backward(
            p_grad_x + o, p_h ? p_grad_h + o : nullptr, p_partials + c * parts * dim,
            p_h ? p_grad_out + o : nullptr, p_grad_y + o, p_x + o, p_h ? p_h + o : nullptr,
            gates.at(row), scales.at(row), static_cast<float>(eps), dim);
      }
    }
  });

  Tensor sums = at::zeros({parts, rows, dim}, x.options());
  float* p_sums = sums.mutable_data_ptr<float>();
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t part = 0; part < parts; ++part) {
      float* out = p_sums + (part * rows + chunks[c].row) * dim;
      const float* in = p_partials + (c * parts + part) * dim;
      for (int64_t i = 0; i < dim; ++i) {
        out[i] += in[i];
      }
    }
  }
  return {grad_x, grad_h, sums};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(imf_kernels, m) {
  m.def(
      "modulated_layer_norm_cpu(Tensor x, Tensor? h, Tensor? gate, Tensor shift, Tensor scale, "
      "Tensor? index, float eps) -> (Tensor, Tensor)");
  m.def(
      "modulated_layer_norm_backward_cpu(Tensor grad_out, Tensor grad_y, Tensor x, Tensor? h, "
      "Tensor? gate, Tensor scale, Tensor? starts, Tensor? lengths, float eps) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(imf_kernels, CPU, m) {
  m.impl("modulated_layer_norm_cpu", &modulated_layer_norm);
  m.impl("modulated_layer_norm_backward_cpu", &modulated_layer_norm_backward);
}

TORCH_LIBRARY_IMPL(imf_kernels, Autograd, m) {
  m.impl("modulated_layer_norm_cpu", torch::CppFunction::makeFallthrough());
  m.impl("modulated_layer_norm_backward_cpu", torch::CppFunction::makeFallthrough());
}
