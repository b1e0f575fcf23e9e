#include "../numpy_module.h"

namespace imgopt {

void register_masked_matmul(py::module_&) {}

}  // namespace imgopt
