#include "graph.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/headeronly/version.h>
#include <torch/library.h>

#include "copies.h"

namespace imf {

using c10::cuda::CUDAStream;
using c10::cuda::CUDAStreamGuard;

class Captured : public at::cuda::CUDAGraph {
 public:
  // The stream's capture has ended, and with it the routing of allocations.
  bool stream_ended() const {
    return graph_ != nullptr;
  }

  // Destruction will release the pool.
  bool holds_pool() const {
    return capture_ended_;
  }

  bool stream_began() const {
    return capture_id_ != 0;
  }

  void free_generators() {
#if TORCH_VERSION_MINOR < 12
    // Before 2.12 a generator has one flag for all captures, and only their regular end clears it.
    for (auto& [state, increment] : captured_generator_states_) {
      state->capturing_ = false;
    }
#endif
  }
};

namespace {

CUDAStream stream_of(int64_t stream_id, int64_t device) {
  return CUDAStream::unpack3(
      stream_id, static_cast<c10::DeviceIndex>(device), c10::DeviceType::CUDA);
}

template <typename Function>
void quietly(const Function& function) noexcept {
  try {
    function();
  } catch (const std::exception&) {
    // one step of an abort had nothing to undo
  }
}

void copy(const Copies& copies, const CUDAStream& stream) {
  std::vector<at::Tensor> kept;
  auto segments = segments_of(copies.destinations, copies.sources, copies.pads, kept);
  C10_CUDA_CHECK(static_cast<cudaError_t>(launch_ragged_copy(
      segments.data(), static_cast<uint32_t>(segments.size()), stream.stream())));
}

}  // namespace

Graph::Graph(Pool pool, int64_t stream_id, int64_t device)
    : pool_(pool), stream_(stream_of(stream_id, device)), graph_(std::make_unique<Captured>()) {}

Graph::~Graph() {
  abort();
}

void Graph::begin() {
  TORCH_CHECK(graph_ && !capturing_, "begin: expected a new graph");
  CUDAStreamGuard guard(stream_);
  capturing_ = true;
  graph_->capture_begin({pool_.first, pool_.second}, cudaStreamCaptureModeThreadLocal);
}

void Graph::end() {
  TORCH_CHECK(capturing_, "end: expected a graph that captures");
  CUDAStreamGuard guard(stream_);
  graph_->capture_end();
  capturing_ = false;
}

void Graph::abort() noexcept {
  if (!capturing_) {
    return;
  }
  capturing_ = false;
  quietly([&] {
    CUDAStreamGuard guard(stream_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(stream_, &status) == cudaSuccess &&
        status != cudaStreamCaptureStatusNone) {
      cudaGraph_t unfinished = nullptr;
      cudaStreamEndCapture(stream_, &unfinished);
      if (unfinished != nullptr) {
        cudaGraphDestroy(unfinished);
      }
    }
    cudaGetLastError();  // what a broken capture reported is dealt with
  });
  const auto device = stream_.device_index();
  const c10::MempoolId_t pool{pool_.first, pool_.second};
  auto* host = at::getHostAllocator(at::kCUDA);
  if (!graph_->stream_ended()) {
    quietly([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool); });
    quietly([&] { host->end_allocate_to_pool(pool); });
#if TORCH_VERSION_MINOR >= 13
    if (graph_->stream_began()) {
      quietly([&] { c10::cuda::CUDACachingAllocator::markCaptureEnd(device); });
    }
#endif
  }
  if (!graph_->holds_pool()) {
    quietly([&] { c10::cuda::CUDACachingAllocator::releasePool(device, pool); });
    quietly([&] { host->release_pool(pool); });
  }
  graph_->free_generators();
  graph_.reset();
}

void Graph::replay() {
  TORCH_CHECK(graph_, "replay: expected a captured graph, got an aborted one");
  graph_->replay();
}

Slot::Slot(int64_t stream_id, int64_t device) : stream_(stream_of(stream_id, device)) {
  c10::cuda::CUDAGuard guard(stream_.device_index());
  C10_CUDA_CHECK(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming));
  C10_CUDA_CHECK(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming));
}

Slot::~Slot() {
  for (cudaEvent_t event : {ready_, done_}) {
    if (event != nullptr) {
      C10_CUDA_CHECK_WARN(cudaEventDestroy(event));
    }
  }
}

void Slot::replay(
    const Copies& in, const std::vector<std::shared_ptr<Graph>>& graphs, const Copies& out) {
  const auto caller = c10::cuda::getCurrentCUDAStream(stream_.device_index());
  CUDAStreamGuard guard(stream_);
  C10_CUDA_CHECK(cudaEventRecord(ready_, caller));
  C10_CUDA_CHECK(cudaStreamWaitEvent(stream_, ready_, 0));
  copy(in, stream_);
  for (const auto& graph : graphs) {
    graph->replay();
  }
  copy(out, stream_);
  C10_CUDA_CHECK(cudaEventRecord(done_, stream_));
  C10_CUDA_CHECK(cudaStreamWaitEvent(caller, done_, 0));
}

}  // namespace imf

TORCH_LIBRARY_IMPL(imf_kernels, CUDA, m) {
  m.impl("ragged_copy", [](at::TensorList destinations,
                           const c10::List<std::optional<at::Tensor>>& sources,
                           c10::ArrayRef<double> pads) {
    if (destinations.empty()) {
      return;
    }
    imf::Copies copies{destinations.vec(), {}, pads.vec()};
    for (size_t i = 0; i < sources.size(); ++i) {
      copies.sources.push_back(sources.get(i));
    }
    c10::cuda::CUDAGuard guard(destinations[0].device());
    imf::copy(copies, c10::cuda::getCurrentCUDAStream());
  });
}
