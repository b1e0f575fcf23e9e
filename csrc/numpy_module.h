// What the NumPy bindings share: pybind11, and the loop that spreads a kernel's range over OpenMP threads. torch's
// wheels ship libgomp under its plain name, so this is the same pool that torch uses in one process.
#pragma once

#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>

#include "kernels.h"

namespace imgopt {

namespace py = pybind11;

// GNU OpenMP's pool does not survive fork(): the first parallel region of a child hangs. A child of the process that
// loaded this module therefore works with one thread.
inline const pid_t kLoadedBy = getpid();
inline int thread_count() { return getpid() == kLoadedBy ? omp_get_max_threads() : 1; }

template <class Body>
void parallel_units(int64_t units, int64_t grain, const Body& body) {
    const int64_t useful = std::max<int64_t>(1, units / std::max<int64_t>(1, grain));
    const int threads = static_cast<int>(std::min<int64_t>(useful, thread_count()));
    if (threads == 1) {
        if (units > 0) body(0, units);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) body(units * t / threads, units * (t + 1) / threads);
}

void register_affine_warp(py::module_& m);
void register_int8_conv2d(py::module_& m);
void register_masked_matmul(py::module_& m);
void register_philox(py::module_& m);
void register_probe(py::module_& m);

}  // namespace imgopt
