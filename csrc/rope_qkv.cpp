// Rotary positions on packed q, k, v of float32 on the CPU, in place. The specification is in
// imf_kernels/ops/rope_qkv.py: interleaved pairs of the first heads of q and k.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>

#include "multiversion.h"

namespace {

using at::Tensor;

constexpr int64_t kGrain = 64;  // frames

IMF_MULTIVERSION void rotate(
    float* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin,
    int64_t heads, int64_t half) {
  for (int64_t head = 0; head < heads; ++head, x += 2 * half) {
    for (int64_t i = 0; i < half; ++i) {
      const float even = x[2 * i];
      const float odd = x[2 * i + 1];
      x[2 * i] = even * cos[i] - odd * sin[i];
      x[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
  }
}

void rope_qkv_(
    const Tensor& qkv, const Tensor& rope, const Tensor& starts, const Tensor& index,
    int64_t heads) {
  const int64_t frames = qkv.size(0);
  const int64_t section = qkv.stride(1);
  const int64_t half = qkv.size(3) / 2;
  TORCH_CHECK(qkv.stride(3) == 1 && qkv.stride(2) == 2 * half, "qkv: dense heads");
  const Tensor first = starts.to(at::kInt).contiguous();
  const Tensor rows = index.to(at::kInt).contiguous();
  const Tensor table = rope.contiguous();
  float* x = qkv.mutable_data_ptr<float>();
  const float* angles = table.const_data_ptr<float>();
  const int32_t* start = first.const_data_ptr<int32_t>();
  const int32_t* row_of = rows.const_data_ptr<int32_t>();

  at::parallel_for(0, frames, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t frame = begin; frame < end; ++frame) {
      if (row_of[frame] < 0) {
        continue;
      }
      const float* cos = angles + (frame - start[row_of[frame]]) * 2 * half;
      float* q = x + frame * qkv.stride(0);
      rotate(q, cos, cos + half, heads, half);
      rotate(q + section, cos, cos + half, heads, half);
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(imf_kernels, m) {
  m.def("rope_qkv_cpu_(Tensor(a!) qkv, Tensor rope, Tensor starts, Tensor index, int heads) -> ()");
}

TORCH_LIBRARY_IMPL(imf_kernels, CPU, m) {
  m.impl("rope_qkv_cpu_", &rope_qkv_);
}

TORCH_LIBRARY_IMPL(imf_kernels, Autograd, m) {
  m.impl("rope_qkv_cpu_", torch::CppFunction::makeFallthrough());
}
