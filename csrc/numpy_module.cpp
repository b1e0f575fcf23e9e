// The Python module imgopt_fast._core: control of the instruction set, and the three operations on NumPy arrays.
// It exists because a torch schema can say neither "which ISA is active" nor "this NumPy array", and so that
// `import imgopt_fast.numpy` needs no torch.
#include "numpy_module.h"

using namespace imgopt;

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.doc() = "Kernels of imgopt_fast on NumPy arrays, and control of the instruction set that serves them.";
    m.def("active_isa", [] { return std::string(active_isa()); }, "Name of the instruction set in use.");
    m.def(
        "set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"),
        "Use the named instruction set from now on, in this module and in the torch operations.");
    m.def(
        "supported_isas",
        [] {
            std::vector<std::string> names;
            for (const char* const* name = supported_isas(); *name; ++name) names.emplace_back(*name);
            return names;
        },
        "Instruction sets of this build that the processor has, the best one last.");
    register_affine_warp(m);
    register_int8_conv2d(m);
    register_masked_matmul(m);
    register_philox(m);
    register_probe(m);
}
