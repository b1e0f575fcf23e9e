// masked_matmul for NumPy: the structure of a mask, which both faces build here, and the product itself.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../numpy_module.h"

namespace imgopt {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr int64_t kFewestSteps = 4;  // FEWEST_STEPS of ops/masked_matmul/reference.py

// One block of one quad: its columns sorted by kind, in the order of ops/masked_matmul/reference.py.
struct QuadColumns {
    std::vector<int32_t> all_four, pair[2], single[4];

    void build(const std::vector<uint8_t>& patterns) {
        for (std::vector<int32_t>* list :
             {&all_four, &pair[0], &pair[1], &single[0], &single[1], &single[2], &single[3]})
            list->clear();
        const bool use_four = std::count(patterns.begin(), patterns.end(), 15) >= kFewestSteps;
        int64_t in_pair[2] = {};
        for (const uint8_t pattern : patterns)
            for (int half = 0; half < 2; ++half)
                in_pair[half] += !(use_four && pattern == 15) && (pattern >> 2 * half & 3) == 3;
        const int64_t both = std::min(in_pair[0], in_pair[1]);
        const size_t pairs = both < kFewestSteps ? 0 : static_cast<size_t>(both);
        for (size_t c = 0; c < patterns.size(); ++c) {
            const int32_t column = static_cast<int32_t>(c);
            if (use_four && patterns[c] == 15) {
                all_four.push_back(column);
                continue;
            }
            for (int half = 0; half < 2; ++half) {
                const int rows = patterns[c] >> 2 * half & 3;
                if (rows == 3 && pair[half].size() < pairs) {
                    pair[half].push_back(column);
                    continue;
                }
                for (int r = 0; r < 2; ++r)
                    if (rows >> r & 1) single[2 * half + r].push_back(column);
            }
        }
    }
};

// (quads, columns, position), see ops/masked_matmul/layout.py.
std::tuple<py::array, py::array, py::array> mask_structure(const Array<bool>& mask, int64_t block) {
    if (mask.ndim() != 2 || block < 1) throw py::value_error("mask: expected (rows, columns) and a positive block");
    const int64_t rows = mask.shape(0), columns = mask.shape(1), blocks = (columns + block - 1) / block;
    const int64_t quads = (rows + 3) / 4;
    const bool* data = mask.data();
    std::vector<int32_t> table, local, position;
    table.reserve(static_cast<size_t>(blocks * quads * RowQuads::kFields));
    {
        py::gil_scoped_release release;
        QuadColumns parts;
        std::vector<uint8_t> patterns;
        std::vector<int64_t> order(static_cast<size_t>(quads * 4)), count(static_cast<size_t>(quads * 4));
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * block, width = std::min(block, columns - first);
            for (int64_t r = 0; r < quads * 4; ++r) {
                order[r] = r;
                count[r] =
                    r < rows ? std::count(data + r * columns + first, data + r * columns + first + width, true) : 0;
            }
            for (int64_t r = 0; r < quads * 4; r += RowQuads::kWindow)
                std::stable_sort(order.begin() + r, order.begin() + std::min(quads * 4, r + RowQuads::kWindow),
                                 [&](int64_t i, int64_t j) { return count[i] > count[j]; });
            for (int64_t q = 0; q < quads; ++q) {
                const int64_t* row = &order[q * 4];
                patterns.assign(static_cast<size_t>(width), 0);
                for (int lane = 0; lane < 4; ++lane)
                    for (int64_t c = 0; row[lane] < rows && c < width; ++c)
                        patterns[c] |= static_cast<uint8_t>(data[row[lane] * columns + first + c] << lane);
                parts.build(patterns);
                size_t singles = 0;
                for (const auto& list : parts.single) singles = std::max(singles, list.size());

                for (int lane = 0; lane < 4; ++lane) table.push_back(static_cast<int32_t>(row[lane]));
                table.push_back(static_cast<int32_t>(position.size() / 4));
                table.push_back(static_cast<int32_t>(local.size()));
                for (const size_t n : {parts.all_four.size(), parts.pair[0].size(), singles})
                    table.push_back(static_cast<int32_t>(n));

                const auto place = [&](int lane, int32_t column) {
                    position.push_back(static_cast<int32_t>(row[lane] * columns + first + column));
                };
                for (const int32_t column : parts.all_four) {
                    local.push_back(column);
                    for (int lane = 0; lane < 4; ++lane) place(lane, column);
                }
                for (size_t i = 0; i < parts.pair[0].size(); ++i)
                    for (int half = 0; half < 2; ++half) {
                        local.push_back(parts.pair[half][i]);
                        for (int r = 0; r < 2; ++r) place(2 * half + r, parts.pair[half][i]);
                    }
                for (size_t i = 0; i < singles; ++i)
                    for (int lane = 0; lane < 4; ++lane) {
                        const bool real = i < parts.single[lane].size();
                        local.push_back(real ? parts.single[lane][i] : 0);
                        if (real)
                            place(lane, parts.single[lane][i]);
                        else
                            position.push_back(-1);
                    }
            }
        }
    }
    py::array_t<int32_t> quads_out({blocks, quads, static_cast<int64_t>(RowQuads::kFields)});
    std::copy(table.begin(), table.end(), quads_out.mutable_data());
    py::array_t<int32_t> position_out(static_cast<py::ssize_t>(position.size()));
    std::copy(position.begin(), position.end(), position_out.mutable_data());
    if (block > 256) {
        py::array_t<int32_t> wide(static_cast<py::ssize_t>(local.size()));
        std::copy(local.begin(), local.end(), wide.mutable_data());
        return {quads_out, wide, position_out};
    }
    py::array_t<uint8_t> narrow(static_cast<py::ssize_t>(local.size()));
    std::transform(local.begin(), local.end(), narrow.mutable_data(),
                   [](int32_t c) { return static_cast<uint8_t>(c); });
    return {quads_out, narrow, position_out};
}

DType real_type(const py::array& array) {
    switch (array.dtype().char_()) {
        case 'e': return DType::f16;
        case 'f': return DType::f32;
        case 'd': return DType::f64;
        default: throw py::type_error("input: expected float16, float32 or float64");
    }
}

void require(bool condition, const char* message) {
    if (!condition) throw py::value_error(message);
}

bool contiguous(const py::array& array) { return array.flags() & py::array::c_style; }

constexpr int64_t kWorthThread = 1 << 18;  // multiply-adds, as in torch.cpp

void matmul(const py::array& input, const py::array& values, const std::optional<py::array>& bias,
            const py::array_t<int32_t>& quads, const py::array& columns, int64_t block, py::array& output) {
    const DType dtype = real_type(input);
    const char wide = dtype == DType::f64 ? 'd' : 'f';
    require(input.ndim() == 2 && contiguous(input), "input: expected contiguous (samples, inputs)");
    require(output.ndim() == 2 && contiguous(output) && output.writeable() && real_type(output) == dtype &&
                output.shape(0) == input.shape(0),
            "output: expected contiguous (samples, outputs) of the input's dtype");
    require(values.ndim() == 1 && contiguous(values) && values.dtype().char_() == wide,
            "values: expected contiguous float32, float64 for float64");
    const int64_t samples = input.shape(0), width = input.shape(1), rows = output.shape(1);
    require(quads.ndim() == 3 && contiguous(quads) && quads.shape(1) == (rows + 3) / 4 &&
                quads.shape(2) == RowQuads::kFields && block > 0 && quads.shape(0) == (width + block - 1) / block,
            "quads: expected contiguous int32 (blocks, ceil(outputs / 4), 9)");
    const bool int32_columns = columns.dtype().itemsize() == 4;
    require(contiguous(columns) && columns.dtype().kind() == (int32_columns ? 'i' : 'u'),
            "columns: expected contiguous uint8 or int32");
    require(!bias || (bias->ndim() == 1 && bias->shape(0) == rows && contiguous(*bias) && real_type(*bias) == dtype),
            "bias: expected contiguous (outputs,) of the input's dtype");
    const MaskedMatmul p{
        {quads.data(), columns.data(), rows, quads.shape(0), block, int32_columns},
        {dtype, input.data(), samples, width, width, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {1, 1}},
        values.data(),
        bias ? bias->data() : nullptr,
        output.mutable_data()};
    const int64_t windows = (rows + RowQuads::kWindow - 1) / RowQuads::kWindow;
    const int64_t units = windows * ((samples + MaskedMatmul::kPanel - 1) / MaskedMatmul::kPanel);
    const int64_t grain = 1 + kWorthThread * units / (values.size() * samples + 1);
    const KernelTable& table = kernels();
    const py::gil_scoped_release release;
    parallel_units(units, grain, [&](int64_t begin, int64_t end) { table.masked.matmul(p, begin, end); });
}

}  // namespace

void register_masked_matmul(py::module_& m) {
    m.def("mask_structure", mask_structure, py::arg("mask"), py::arg("block"),
          "Row quads of a mask (rows, columns): (quads, columns, position).");
    m.def("masked_matmul", matmul, py::arg("input"), py::arg("values"), py::arg("bias").none(true),
          py::arg("quads").noconvert(), py::arg("columns"), py::arg("block"), py::arg("output"),
          "Product into `output`; imgopt_fast.numpy.masked_matmul has the checks.");
}

}  // namespace imgopt
