#include "../numpy_module.h"

namespace imgopt {

void register_affine_warp(py::module_&) {}

}  // namespace imgopt
