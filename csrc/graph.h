// Captured graphs and the streams they run on. What is captured, when, and for which request is
// decided in imf_kernels/graphs/.

#pragma once

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace imf {

using Pool = std::pair<uint64_t, uint64_t>;

// CUDAGraph with its protected state readable: an abort has to know how far a capture came.
class Captured;

// One graph, captured on `stream` with its memory in `pool`.
class Graph {
 public:
  Graph(Pool pool, int64_t stream_id, int64_t device);
  ~Graph();

  // Starts to capture what this thread launches on the stream, in thread-local mode. If it throws,
  // as `end` may, `abort` is still to be called.
  void begin();
  void end();

  // Undoes a capture that has begun and will not end: the stream's capture, the routing of both
  // allocators, the pool's reference, the generators. Never throws; nothing to do is fine.
  void abort() noexcept;

  // Launches the graph on the current stream.
  void replay();

 private:
  const Pool pool_;
  const c10::cuda::CUDAStream stream_;
  std::unique_ptr<Captured> graph_;
  bool capturing_ = false;
};

// Tensors moved by a replay, as in ops/ragged_copy.py.
struct Copies {
  std::vector<at::Tensor> destinations;
  std::vector<std::optional<at::Tensor>> sources;
  std::vector<double> pads;
};

// A stream with what orders it with its callers. One replay at a time: callers hold a lock.
class Slot {
 public:
  Slot(int64_t stream_id, int64_t device);
  ~Slot();

  // Copies in, launches the graphs in turn and copies out, on the slot's stream, after what the
  // caller's current stream holds now and before what it is given next. Does not wait.
  void replay(const Copies& in, const std::vector<std::shared_ptr<Graph>>& graphs, const Copies& out);

 private:
  const c10::cuda::CUDAStream stream_;
  cudaEvent_t ready_ = nullptr, done_ = nullptr;
};

}  // namespace imf
