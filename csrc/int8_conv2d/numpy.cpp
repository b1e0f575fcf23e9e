#include "../numpy_module.h"

namespace imgopt {

void register_int8_conv2d(py::module_&) {}

}  // namespace imgopt
