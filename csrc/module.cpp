// imf_kernels._C. Importing it, after torch, also runs the static initialisers of the other files,
// which register their operators with PyTorch's dispatcher as torch.ops.imf_kernels.<name>.

#include <torch/csrc/utils/pybind.h>

#ifdef IMF_WITH_CUDA
#include "graph.h"
#endif

namespace {

// Tensors whose storage may not move: a captured graph has their addresses.
class Fixed {
 public:
  explicit Fixed(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const auto& tensor : tensors_) {
      addresses_.push_back(tensor.const_data_ptr());
    }
  }

  // Index of the first tensor that lies elsewhere now, or -1.
  int64_t moved() const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].const_data_ptr() != addresses_[i]) {
        return static_cast<int64_t>(i);
      }
    }
    return -1;
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<const void*> addresses_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "C++ operators, registered on import, and the CUDA graph runtime.";

  py::class_<Fixed>(m, "Fixed", "Tensors whose storage may not move.")
      .def(py::init<std::vector<at::Tensor>>(), py::arg("tensors"))
      .def("moved", &Fixed::moved, "Index of the first tensor that lies elsewhere now, or -1.");

#ifdef IMF_WITH_CUDA
  m.attr("CUDA") = true;
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::class_<imf::Graph, std::shared_ptr<imf::Graph>>(m, "Graph", "One captured CUDA graph.")
      .def(
          py::init<imf::Pool, int64_t, int64_t>(), py::arg("pool"), py::arg("stream_id"),
          py::arg("device"))
      .def("begin", &imf::Graph::begin, without_gil)
      .def("end", &imf::Graph::end, without_gil)
      .def("abort", &imf::Graph::abort, without_gil)
      .def("replay", &imf::Graph::replay, without_gil);

  py::class_<imf::Slot>(m, "Slot", "A stream, ordered with its callers' streams.")
      .def(py::init<int64_t, int64_t>(), py::arg("stream_id"), py::arg("device"))
      .def(
          "replay",
          [](imf::Slot& slot, std::vector<at::Tensor> destinations,
             std::vector<std::optional<at::Tensor>> sources, std::vector<double> pads,
             const std::vector<std::shared_ptr<imf::Graph>>& graphs,
             std::vector<at::Tensor> outputs, std::vector<at::Tensor> results) {
            const imf::Copies in{std::move(destinations), std::move(sources), std::move(pads)};
            const std::vector<double> none(outputs.size(), 0.0);
            const imf::Copies out{
                std::move(outputs), {results.begin(), results.end()}, none};
            slot.replay(in, graphs, out);
          },
          py::arg("destinations"), py::arg("sources"), py::arg("pads"), py::arg("graphs"),
          py::arg("outputs"), py::arg("results"), without_gil,
          "Copy in, launch the graphs in turn, copy `results` out; nothing waits.");
#else
  m.attr("CUDA") = false;
#endif
}
