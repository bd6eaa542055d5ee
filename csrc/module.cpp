// imf_kernels._C: importing it, after torch, runs the static initialisers of the other files, which
// register their operators with PyTorch's dispatcher as torch.ops.imf_kernels.<name>.

#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      .m_base = PyModuleDef_HEAD_INIT,
      .m_name = "imf_kernels._C",
      .m_doc = "C++ operators, registered on import.",
      .m_size = -1,
  };
  return PyModule_Create(&definition);
}
