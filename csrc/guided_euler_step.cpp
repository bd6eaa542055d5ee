// The guided Euler step on the CPU in one pass over memory, bit for bit equal in float32 to the
// plain-PyTorch reference in imf_kernels/ops/guided_euler_step.py (which is why this file is
// compiled with -ffp-contract=off).
//
//   g    = v                   velocity of B rows, or
//          u + w (c - u)       of 2B rows, [0:B] conditional and [B:2B] unconditional
//   step = sum_s dt_s g_s      0 beyond a row's length, whatever the velocity holds there
//   x + step,  displacement + step,  (x + step) in the model's dtype
//
// Autograd-free: the result never requires grad, whatever the inputs do. Gradients belong to the
// Python op that calls this one.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "multiversion.h"

namespace {

using at::ScalarType;
using at::Tensor;

// Elements whose step stays in L1 between the first load and the last store.
constexpr int64_t kTile = 1024;

// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// The sum of no terms: adding -0 changes no float, whereas adding +0 turns -0 into +0.
constexpr float kNoTerm = -0.0f;

template <typename scalar_t>
IMF_MULTIVERSION void add_velocity(
    float* __restrict__ step, const scalar_t* __restrict__ v, float dt, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    step[i] += dt * static_cast<float>(v[i]);
  }
}

template <typename scalar_t>
IMF_MULTIVERSION void add_guided_velocity(
    float* __restrict__ step,
    const scalar_t* __restrict__ conditional,
    const scalar_t* __restrict__ unconditional,
    float w,
    float dt,
    int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float c = static_cast<float>(conditional[i]);
    const float u = static_cast<float>(unconditional[i]);
    step[i] += dt * (u + w * (c - u));
  }
}

IMF_MULTIVERSION void add(
    float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = a[i] + b[i];
  }
}

template <typename scalar_t>
IMF_MULTIVERSION void convert(
    scalar_t* __restrict__ out, const float* __restrict__ in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<scalar_t>(in[i]);
  }
}

struct Problem {
  int64_t substeps, rows, frames, channels;
  bool guided;
  const float* x;
  const float* dt;
  const float* guidance;  // null: `scale` for every row
  float scale;
  const int64_t* lengths;     // null: every frame is valid
  const float* displacement;  // null: not asked for
  float* x_out;
  float* displacement_out;
};

// `model_out` is null where no model input was asked for.
template <typename velocity_t, typename model_t>
void solve(const Problem& p, const velocity_t* velocity, model_t* model_out) {
  const int64_t row_size = p.frames * p.channels;
  const int64_t velocity_rows = p.guided ? 2 * p.rows : p.rows;

  at::parallel_for(0, p.rows * row_size, kGrain, [&](int64_t begin, int64_t end) {
    alignas(64) float step[kTile];
    int64_t n = 0;
    for (int64_t i = begin; i < end; i += n) {
      // A tile ends with its row, and where the row's valid frames end.
      const int64_t row = i / row_size;
      const int64_t row_end = (row + 1) * row_size;
      const int64_t valid = p.lengths ? std::clamp<int64_t>(p.lengths[row], 0, p.frames) : p.frames;
      const int64_t valid_end = row * row_size + valid * p.channels;
      const bool moves = i < valid_end;
      n = std::min({kTile, end - i, (moves ? valid_end : row_end) - i});

      std::fill_n(step, n, kNoTerm);
      for (int64_t s = 0; moves && s < p.substeps; ++s) {
        const velocity_t* v = velocity + s * velocity_rows * row_size + i;
        const float dt = p.dt[s * p.rows + row];
        if (p.guided) {
          const float w = p.guidance ? p.guidance[row] : p.scale;
          add_guided_velocity(step, v, v + p.rows * row_size, w, dt, n);
        } else {
          add_velocity(step, v, dt, n);
        }
      }

      add(p.x_out + i, p.x + i, step, n);
      if (p.displacement) {
        add(p.displacement_out + i, p.displacement + i, step, n);
      }
      if (model_out) {
        convert(model_out + i, p.x_out + i, n);
      }
    }
  });
}

void check(const Tensor& tensor, const char* name, ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.sizes() == shape && tensor.is_contiguous(),
      "guided_euler_step_cpu: ", name, ": expected a contiguous ", dtype, " tensor of shape ",
      shape, ", got ", tensor.is_contiguous() ? "" : "a non-contiguous ", tensor.scalar_type(), " ",
      tensor.sizes());
}

void check_floating(ScalarType dtype, const char* name) {
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
      "guided_euler_step_cpu: ", name, ": expected float32, bfloat16, float16 or float64, got ",
      dtype);
}

template <typename scalar_t>
const scalar_t* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<scalar_t>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> guided_euler_step_cpu(
    const Tensor& x,
    const Tensor& velocity,
    const Tensor& dt,
    const std::optional<Tensor>& guidance,
    double scale,
    const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& displacement,
    std::optional<ScalarType> model_dtype) {
  TORCH_CHECK(
      x.dim() == 3, "guided_euler_step_cpu: x: expected shape (B, N, C), got ", x.sizes());
  const int64_t rows = x.size(0), frames = x.size(1), channels = x.size(2);
  check(x, "x", at::kFloat, {rows, frames, channels});

  TORCH_CHECK(
      velocity.dim() == 4 && velocity.size(0) >= 1 &&
          (velocity.size(1) == rows || velocity.size(1) == 2 * rows),
      "guided_euler_step_cpu: velocity: expected shape (S, R, N, C) with S >= 1 and R = ", rows,
      " (unguided) or ", 2 * rows, " (guided), got ", velocity.sizes());
  const int64_t substeps = velocity.size(0), velocity_rows = velocity.size(1);
  check_floating(velocity.scalar_type(), "velocity");
  check(
      velocity, "velocity", velocity.scalar_type(), {substeps, velocity_rows, frames, channels});

  check(dt, "dt", at::kFloat, {substeps, rows});
  if (guidance) {
    check(*guidance, "guidance", at::kFloat, {rows});
  }
  if (lengths) {
    check(*lengths, "lengths", at::kLong, {rows});
  }
  if (displacement) {
    check(*displacement, "displacement", at::kFloat, x.sizes());
  }
  if (model_dtype) {
    check_floating(*model_dtype, "model_dtype");
  }

  const auto output = [&](bool asked_for, ScalarType dtype) {
    return at::empty(asked_for ? x.sizes() : at::IntArrayRef{0}, x.options().dtype(dtype));
  };
  Tensor x_out = output(true, at::kFloat);
  Tensor displacement_out = output(displacement.has_value(), at::kFloat);
  Tensor model_out = output(model_dtype.has_value(), model_dtype.value_or(at::kFloat));

  const Problem problem{
      .substeps = substeps,
      .rows = rows,
      .frames = frames,
      .channels = channels,
      .guided = velocity_rows != rows,
      .x = x.const_data_ptr<float>(),
      .dt = dt.const_data_ptr<float>(),
      .guidance = data_or_null<float>(guidance),
      .scale = static_cast<float>(scale),
      .lengths = data_or_null<int64_t>(lengths),
      .displacement = data_or_null<float>(displacement),
      .x_out = x_out.data_ptr<float>(),
      .displacement_out = displacement_out.data_ptr<float>(),
  };
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, velocity.scalar_type(), "guided_euler_step_cpu velocity", [&] {
        const scalar_t* v = velocity.const_data_ptr<scalar_t>();
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kBFloat16, at::kHalf, model_out.scalar_type(), "guided_euler_step_cpu model_dtype",
            [&] { solve(problem, v, model_dtype ? model_out.data_ptr<scalar_t>() : nullptr); });
      });
  return {x_out, displacement_out, model_out};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(imf_kernels, m) {
  m.def(
      "guided_euler_step_cpu(Tensor x, Tensor velocity, Tensor dt, Tensor? guidance, float scale, "
      "Tensor? lengths, Tensor? displacement, ScalarType? model_dtype) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(imf_kernels, CPU, m) {
  m.impl("guided_euler_step_cpu", &guided_euler_step_cpu);
}

// Without this the default fallback would hang a "not implemented" node on the results.
TORCH_LIBRARY_IMPL(imf_kernels, Autograd, m) {
  m.impl("guided_euler_step_cpu", torch::CppFunction::makeFallthrough());
}
