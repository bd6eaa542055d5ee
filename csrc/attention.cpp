// Attention of one row, or of one block of a row, on the CPU in float32, for 64-wide heads and
// AVX-512 (elsewhere PyTorch's own kernel serves). The specification is in
// imf_kernels/ops/attention.py: out[i] = sum_j softmax_j(scale q[i] . k[j]) v[j].
//
// Queries go in blocks of 64, keys in tiles of 64 with an online softmax (FlashAttention-2, arXiv
// 2307.08691). The block's queries are transposed once; scores then lie with the queries along the
// registers, so that the softmax is elementwise, and a score and an output need nothing but
// products of a broadcast number and four registers. A query's arithmetic does not depend on its
// neighbours.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kWidth = 64;  // channels of a head, queries of a block, keys of a tile
constexpr int64_t kRows = 6;    // of a product at a time: 24 accumulators of 32 registers
constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = kWidth / kLanes;

struct Head {
  const float* q;
  const float* k;
  const float* v;
  float* out;
  int64_t q_stride;  // elements from one frame's q to the next
  int64_t stride;    // and from one frame's k or v
  int64_t out_stride;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define IMF_AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

IMF_AVX512 inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

IMF_AVX512 inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// 2^x for x <= 0, to one unit in the last place; below 2^-126 it is 0.
IMF_AVX512 inline Vector exp2_of(Vector x) {
  const Vector lowest = Vector{} - 126.0f;
  const Integers below = x < lowest;
  x = below ? lowest : x;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);
  Vector y = Vector{} + 1.535336188319500e-4f;
  y = y * f + 1.339887440266574e-3f;
  y = y * f + 9.618437357674640e-3f;
  y = y * f + 5.550332471162809e-2f;
  y = y * f + 2.402264791363012e-1f;
  y = y * f + 6.931472028550421e-1f;
  y = y * f + 1.0f;
  const Integers exponent = (Integers)shifted << 23;
  const Vector scaled = (Vector)((Integers)y + exponent);
  return below ? Vector{} : scaled;
}

// A matrix of which only single elements are read.
struct Factors {
  const float* data;
  int64_t row, column;  // strides

  Factors from(int64_t i) const { return {data + i * row, row, column}; }
};

// c[i][0:n] += sum_d a[i][d] b[d][0:n], d < depth, for `count` rows of 64 and n = 16 `vectors`.
template <int64_t count, int64_t vectors>
IMF_AVX512 inline void multiply(
    float* c, Factors a, const float* b, int64_t b_stride, int64_t depth) {
  Vector sums[count][vectors];
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < vectors; ++j) {
      sums[i][j] = load(c + i * kWidth + j * kLanes);
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vector row[vectors];
    for (int64_t j = 0; j < vectors; ++j) {
      row[j] = load(b + d * b_stride + j * kLanes);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float factor = a.data[i * a.row + d * a.column];
      for (int64_t j = 0; j < vectors; ++j) {
        sums[i][j] += factor * row[j];
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < vectors; ++j) {
      store(c + i * kWidth + j * kLanes, sums[i][j]);
    }
  }
}

template <int64_t vectors>
IMF_AVX512 void multiply_rows(
    int64_t count, float* c, Factors a, const float* b, int64_t b_stride, int64_t depth) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    multiply<kRows, vectors>(c + i * kWidth, a.from(i), b, b_stride, depth);
  }
  for (; i + 4 <= count; i += 4) {
    multiply<4, vectors>(c + i * kWidth, a.from(i), b, b_stride, depth);
  }
  for (; i < count; ++i) {
    multiply<1, vectors>(c + i * kWidth, a.from(i), b, b_stride, depth);
  }
}

// `count` <= 64 queries of one head against `keys` keys. `scale` holds log2(e); `lse` takes the
// natural logarithm of every softmax's sum.
IMF_AVX512 void attend(
    const Head& head, int64_t first, int64_t count, int64_t keys, float scale, float* lse) {
  alignas(64) float queries[kWidth * kWidth] = {};  // [channel][query], scaled
  alignas(64) float scores[kWidth * kWidth];        // [key][query]
  alignas(64) float out[kWidth * kWidth] = {};      // [query][channel]
  alignas(64) float fade[kWidth];
  Vector most[kVectors];
  Vector sums[kVectors] = {};
  const int64_t vectors = (count + kLanes - 1) / kLanes;
  std::fill_n(most, kVectors, Vector{} - std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < kWidth; ++d) {
      queries[d * kWidth + i] = head.q[(first + i) * head.q_stride + d] * scale;
    }
  }
  for (int64_t n = 0; n < keys; n += kWidth) {
    const int64_t tile = std::min(kWidth, keys - n);
    std::fill_n(scores, tile * kWidth, 0.0f);
    const Factors k{head.k + n * head.stride, head.stride, 1};
    switch (vectors) {
      case 1: multiply_rows<1>(tile, scores, k, queries, kWidth, kWidth); break;
      case 2: multiply_rows<2>(tile, scores, k, queries, kWidth, kWidth); break;
      case 3: multiply_rows<3>(tile, scores, k, queries, kWidth, kWidth); break;
      default: multiply_rows<4>(tile, scores, k, queries, kWidth, kWidth);
    }
    for (int64_t j = 0; j < vectors; ++j) {
      float* s = scores + j * kLanes;
      Vector now = most[j];
      for (int64_t key = 0; key < tile; ++key) {
        const Vector score = load(s + key * kWidth);
        now = now > score ? now : score;
      }
      const Vector factor = exp2_of(most[j] - now);
      Vector sum = sums[j] * factor;
      for (int64_t key = 0; key < tile; ++key) {
        const Vector p = exp2_of(load(s + key * kWidth) - now);
        sum += p;
        store(s + key * kWidth, p);
      }
      store(fade + j * kLanes, factor);
      most[j] = now;
      sums[j] = sum;
    }
    if (n > 0) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < kWidth; ++d) {
          out[i * kWidth + d] *= fade[i];
        }
      }
    }
    multiply_rows<kVectors>(
        count, out, {scores, 1, kWidth}, head.v + n * head.stride, head.stride, tile);
  }
  const float* high = reinterpret_cast<const float*>(most);
  const float* sum = reinterpret_cast<const float*>(sums);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < kWidth; ++d) {
      head.out[(first + i) * head.out_stride + d] = out[i * kWidth + d] / sum[i];
    }
    lse[first + i] = (high[i] + std::log2(sum[i])) * 0.6931471805599453f;
  }
}

bool attention_runs() { return __builtin_cpu_supports("x86-64-v4"); }

#else

void attend(const Head&, int64_t, int64_t, int64_t, float, float*) {}

bool attention_runs() { return false; }

#endif

// Piece p: queries [query_starts, query_ends) see keys [key_starts, key_ends).
void attention(
    const Tensor& q, const Tensor& kv, at::IntArrayRef query_starts, at::IntArrayRef query_ends,
    at::IntArrayRef key_starts, at::IntArrayRef key_ends, double scale, Tensor& out, Tensor& lse) {
  TORCH_CHECK(attention_runs(), "attention_cpu: needs AVX-512");
  TORCH_CHECK(q.size(2) == kWidth && q.stride(2) == 1, "q: dense heads of 64");
  TORCH_CHECK(
      kv.size(3) == kWidth && kv.stride(3) == 1 && kv.size(2) == q.size(1),
      "kv: dense heads of 64, as many as q's");
  const int64_t heads = q.size(1);
  const size_t pieces = query_starts.size();
  TORCH_CHECK(
      query_ends.size() == pieces && key_starts.size() == pieces && key_ends.size() == pieces,
      "pieces: a start and an end of queries and of keys each");
  for (size_t p = 0; p < pieces; ++p) {
    TORCH_CHECK(
        0 <= query_starts[p] && query_ends[p] <= q.size(0) && 0 <= key_starts[p] &&
            key_starts[p] <= key_ends[p] && key_ends[p] <= kv.size(0),
        "pieces: within q and kv");
  }
  const float* p_q = q.const_data_ptr<float>();
  const float* p_kv = kv.const_data_ptr<float>();
  float* p_out = out.mutable_data_ptr<float>();
  float* p_lse = lse.mutable_data_ptr<float>();

  struct Task {
    int64_t head, keys_from, first, count, keys;
  };
  std::vector<Task> tasks;
  for (size_t p = 0; p < pieces; ++p) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t first = query_starts[p]; first < query_ends[p]; first += kWidth) {
        tasks.push_back(
            {head, key_starts[p], first, std::min(kWidth, query_ends[p] - first),
             key_ends[p] - key_starts[p]});
      }
    }
  }
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[i];
      const float* k = p_kv + task.keys_from * kv.stride(0) + task.head * kv.stride(2);
      const Head head{
          p_q + task.head * q.stride(1), k, k + kv.stride(1), p_out + task.head * kWidth,
          q.stride(0), kv.stride(0), heads * kWidth};
      attend(
          head, task.first, task.count, task.keys, static_cast<float>(scale * M_LOG2E),
          p_lse + task.head * lse.stride(0));
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(imf_kernels, m) {
  m.def(
      "attention_cpu(Tensor q, Tensor kv, int[] query_starts, int[] query_ends, "
      "int[] key_starts, int[] key_ends, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_cpu_runs() -> bool", &attention_runs);
}

TORCH_LIBRARY_IMPL(imf_kernels, CPU, m) {
  m.impl("attention_cpu", &attention);
}

TORCH_LIBRARY_IMPL(imf_kernels, Autograd, m) {
  m.impl("attention_cpu", torch::CppFunction::makeFallthrough());
}
