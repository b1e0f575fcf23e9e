"""int8_graph: the runner against the reference interpreter, bit for bit, and the interpreter against int8_conv2d."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import BACKEND

import imgopt_fast
from imgopt_fast import _native
from imgopt_fast.ops.int8_graph import Int8GraphBuilder, Int8Program, fallback, int8_graph, reference, repack

MODES = ("float", "shift")


def weight(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def network(mode: str) -> Int8Program:
    """Every kind of step, every dtype, asymmetric padding, several outputs of which one feeds others."""
    b = Int8GraphBuilder(mode)  # type: ignore[arg-type]
    x = b.quantize(channels=3, scale=2.0**-5, zero_point=120)
    y = b.input(channels=16, scale=0.5, zero_point=-7, dtype=torch.int8)
    scale = torch.exp2(torch.randint(-9, -5, (16,)).float())
    stem = b.conv2d(
        x, weight(16, 3, 3, 3), scale, torch.randn(16), stride=2, padding=((1, 2), (0, 1)), output_scale=0.5,
        output_zero_point=3, output_min=0.0, output_max=40.0,
    )  # fmt: skip
    depthwise = b.conv2d(
        stem, weight(16, 1, 3, 3), 2.0**-7, torch.randn(16), padding=1, groups=16, output_scale=2.0,
        output_zero_point=-3, output_dtype=torch.int8,
    )  # fmt: skip
    block = b.conv2d(
        depthwise, weight(16, 16, 1, 1), scale, output_scale=4.0, output_zero_point=9, residual=stem, output_min=-100.0
    )
    added = b.add(block, y, output_scale=1.0, output_zero_point=3, output_min=-2.0)
    peak = b.max_pool2d(added, 3, 2, 1)
    mean = b.avg_pool2d(added, (3, 2), 2, ((1, 1), (0, 1)), count_include_pad=False, output_scale=2.0)
    padded_mean = b.avg_pool2d(added, 3, 2, 1, output_scale=0.25, output_zero_point=-5, output_dtype=torch.int8)
    joined = b.concat([peak, mean, padded_mean], output_scale=2.0, output_zero_point=7)
    pooled = b.global_avg_pool2d(joined, output_scale=1.0, output_zero_point=1)
    flat = b.flatten(pooled)
    hidden = b.linear(flat, weight(24, 48), 2.0**-6, torch.randn(24), output_scale=4.0, output_zero_point=11)
    skip = b.linear(hidden, weight(24, 24), 2.0**-6, output_scale=4.0, residual=hidden, output_max=300.0)
    logits = b.linear(skip, weight(10, 24), 2.0**-7, torch.randn(10))
    return b.build([logits, joined, b.dequantize(added), b.flatten(peak), y, logits])


def operands(batch: int, height: int, width: int) -> list[torch.Tensor]:
    """Input images of `network`; the second has the size of the stem's output."""
    rows, columns = (height + 3 - 3) // 2 + 1, (width + 1 - 3) // 2 + 1
    y = torch.randint(-128, 128, (batch, 16, rows, columns), dtype=torch.int8)
    return [3 * torch.randn(batch, 3, height, width), y]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def expect(program: Int8Program, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return reference.int8_graph(inputs, program.plan, program.constants, program.packed, list(program.outputs))


@pytest.mark.parametrize("mode", MODES)
def test_runner_matches_reference(isa: str, mode: str) -> None:
    program = network(mode)
    for batch, height, width in ((2, 17, 19), (1, 6, 40), (0, 9, 9), (3, 5, 4)):
        inputs = operands(batch, height, width)
        expected = expect(program, inputs)
        assert_same(int8_graph(inputs, program), expected)
        strided = [x.to(memory_format=torch.channels_last) for x in inputs]
        strided[0] = torch.randn(batch, 3, height, 2 * width)[..., ::2].copy_(inputs[0])
        assert_same(int8_graph(strided, program), expected)


def test_large_images_run_in_groups() -> None:
    """Activations of several megabytes per image: images take turns, and each still gets its own result."""
    program = network("float")
    inputs = operands(3, 560, 420)
    one_by_one = [int8_graph([x[i : i + 1] for x in inputs], program) for i in range(3)]
    expected = [torch.cat(parts) for parts in zip(*one_by_one, strict=True)]
    found = int8_graph(inputs, program)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    # The images of a larger tensor, whose strides are not those of the sizes.
    wide = torch.randn(3, 3, 560, 840)[..., ::2].copy_(inputs[0])
    for a, b in zip(int8_graph([wide, inputs[1]], program), expected, strict=True):
        assert torch.equal(a, b)


def narrowing_network() -> Int8Program:
    """Megabytes per image at first, then little: groups of images grow on the way. Residuals are handed on within a
    group and from one to the next; one is still needed afterwards, one is an output, one is the convolution's input."""
    b = Int8GraphBuilder()

    def layer(x: int, side: int = 1, stride: int = 1, residual: int | None = None) -> int:
        channels = 3 if x == image else 16
        return b.conv2d(
            x, weight(16, channels, side, side), 2.0**-9, torch.randn(16), stride=stride, padding=side // 2,
            output_scale=0.5, output_zero_point=100, residual=residual,
        )  # fmt: skip

    image = b.quantize(channels=3, scale=2.0**-5, zero_point=120)
    wide = layer(image)
    wide = layer(layer(wide), residual=wide)
    wide = layer(layer(wide, side=3), residual=wide)
    small = b.max_pool2d(wide, 4, 4)
    early = layer(wide, stride=2)
    narrow = layer(early, residual=layer(wide, stride=2))
    thumbnail = layer(small)
    for _ in range(2):
        narrow = layer(layer(narrow, side=3), residual=narrow)
    shown = layer(narrow, residual=early)
    last = layer(layer(shown), residual=shown)
    kept = layer(last, residual=narrow)
    tail = layer(layer(kept, stride=8), residual=layer(last, stride=8))
    return b.build(
        [shown, thumbnail, layer(tail, residual=tail), b.flatten(b.global_avg_pool2d(kept, output_scale=0.5))]
    )


def test_groups_grow_where_images_shrink(isa: str) -> None:
    program = narrowing_network()
    images = torch.randn(7, 3, 384, 384)
    found = int8_graph([images], program)
    for i in (0, 3, 6):
        one = int8_graph([images[i : i + 1]], program)
        for a, b in zip(found, one, strict=True):
            assert torch.equal(a[i : i + 1], b)
    assert_same([a[6:] for a in found], expect(program, [images[6:]]))


@pytest.mark.parametrize("mode", MODES)
def test_numba_matches_reference(mode: str) -> None:
    program = network(mode)
    inputs = operands(2, 11, 13)
    found = fallback.int8_graph(inputs, program.plan, program.constants, program.packed, list(program.outputs))
    assert_same(found, expect(program, inputs))


@pytest.mark.parametrize("mode", MODES)
def test_convolution_is_int8_conv2d(mode: str) -> None:
    w, scale, bias = weight(8, 4, 3, 3), torch.full((8,), 2.0**-7), torch.randn(8)
    x = torch.randint(0, 256, (2, 4, 6, 5), dtype=torch.uint8)
    b = Int8GraphBuilder(mode)  # type: ignore[arg-type]
    value = b.input(channels=4, scale=0.25, zero_point=99)
    r = b.input(channels=8, scale=0.125, zero_point=5, dtype=torch.int8)
    out = b.conv2d(
        value, w, scale, bias, stride=(1, 2), padding=(1, 0), dilation=(2, 1), output_scale=0.5, output_zero_point=-8,
        output_dtype=torch.int8, output_max=30.0, residual=r,
    )  # fmt: skip
    residual = torch.randint(-128, 128, (2, 8, 4, 2), dtype=torch.int8)
    found = int8_graph([x, residual], b.build([out]))[0]
    expected = imgopt_fast.int8_conv2d(
        x, w, bias, input_scale=0.25, input_zero_point=99, weight_scale=scale, stride=(1, 2), padding=(1, 0),
        dilation=(2, 1), output_scale=0.5, output_zero_point=-8, output_dtype=torch.int8, output_max=30.0,
        residual=residual, residual_scale=0.125, residual_zero_point=5, requantize=mode,
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [1, 3, 5, 70])  # 1 and 3 planes are interleaved, 64 channels pooled in a vector
def test_steps_mean_what_torch_means(channels: int) -> None:
    """The steps beside convolution against torch's float operators, within half a step of the output."""
    b = Int8GraphBuilder()
    x = b.quantize(channels=channels, scale=0.05, zero_point=128)
    outputs = [
        b.max_pool2d(x, 3, 2, 1),
        b.avg_pool2d(x, 3, 2, 1, output_scale=0.02, output_zero_point=128),
        b.global_avg_pool2d(x, output_scale=0.01, output_zero_point=128),
        b.add(x, x, output_scale=0.1, output_zero_point=100),
        b.flatten(x),
    ]
    program = b.build([b.dequantize(v) for v in outputs])
    image = torch.randn(2, channels, 9, 8)
    real = torch.fake_quantize_per_tensor_affine(image, 0.05, 128, 0, 255)
    found = int8_graph([image], program)
    pool = torch.nn.functional.avg_pool2d(real, 3, 2, 1)
    expected = [torch.max_pool2d(real, 3, 2, 1), pool, real.mean((2, 3), keepdim=True), 2 * real, real.flatten(1)]
    for y, z, step in zip(found, expected, (0.0, 0.02, 0.01, 0.1, 0.0), strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=step / 2 + 1e-5)


def test_survives_copies_and_another_isa() -> None:
    program = network("float")
    inputs = operands(1, 9, 9)
    expected = expect(program, inputs)
    again = pickle.loads(pickle.dumps(copy.deepcopy(program)))
    assert_same(int8_graph(inputs, again), expected)
    foreign = program._replace(packed=torch.zeros_like(program.packed))
    assert_same(int8_graph(inputs, foreign), expected)
    assert_same(int8_graph(inputs, foreign._replace(packed=torch.empty(0, dtype=torch.uint8))), expected)
    fresh = repack(foreign)
    assert torch.equal(fresh.packed, program.packed)
    assert_same(int8_graph(inputs, fresh), expected)


def test_threads_do_not_change_bits() -> None:
    program = network("float")
    inputs = operands(4, 41, 37)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = int8_graph(inputs, program)
        torch.set_num_threads(2)
        assert_same(int8_graph(inputs, program), expected)
    finally:
        torch.set_num_threads(before)


def test_non_finite_input_saturates() -> None:
    b = Int8GraphBuilder()
    x = b.quantize(channels=4, scale=0.1, zero_point=7, rank=2)
    program = b.build([b.dequantize(x), x])
    found = int8_graph([torch.tensor([[math.nan, math.inf, -math.inf, 3e38]])], program)[1]
    assert found.tolist() == [[0, 255, 0, 255]]


def test_opcheck_and_tracing() -> None:
    program = network("float")
    inputs = operands(2, 9, 11)
    op = torch.ops.imgopt_fast.int8_graph.default
    torch.library.opcheck(op, (inputs, program.plan, program.constants, program.packed, list(program.outputs)))

    compiled = torch.compile(lambda xs: int8_graph(xs, program), fullgraph=True, backend="eager", dynamic=True)
    assert_same(compiled(inputs), int8_graph(inputs, program))
    larger = operands(3, 15, 9)
    assert_same(compiled(larger), int8_graph(larger, program))


def test_errors_name_the_argument() -> None:
    program = network("float")
    inputs = operands(1, 9, 9)
    with pytest.raises(ValueError, match="inputs: expected 2 tensors"):
        int8_graph(inputs[:1], program)
    with pytest.raises(TypeError, match=r"inputs\[0\]: expected torch.float32"):
        int8_graph([inputs[0].double(), inputs[1]], program)
    with pytest.raises(ValueError, match=r"inputs\[0\]: expected \(N, 3, H, W\)"):
        int8_graph([torch.randn(1, 4, 9, 9), inputs[1]], program)
    b = Int8GraphBuilder()
    x = b.quantize(channels=4, scale=0.1)
    with pytest.raises(ValueError, match="output_scale"):
        b.conv2d(x, weight(8, 4, 1, 1), 0.1, output_scale=0.0)
    with pytest.raises(ValueError, match="weight: expected 4 input channels"):
        b.conv2d(x, weight(8, 3, 1, 1), 0.1, output_scale=1.0)
    with pytest.raises(ValueError, match="x: expected a"):
        b.linear(x, weight(8, 4), 0.1)
    with pytest.raises(ValueError, match="id of a value"):
        b.flatten(99)
    small = b.build([b.max_pool2d(x, 3)])
    with pytest.raises(ValueError, match="inputs: expected a larger image"):
        int8_graph([torch.randn(1, 4, 2, 2)], small)
    shifted = Int8GraphBuilder("shift")
    with pytest.raises(ValueError, match="scale: expected a power of two"):
        shifted.quantize(channels=3, scale=0.3)


@pytest.mark.skipif(BACKEND != "native", reason="the other backends raise what torch raises")
def test_sizes_that_only_a_run_can_see_are_value_errors() -> None:
    b = Int8GraphBuilder()
    x = b.quantize(channels=4, scale=0.1)
    head = b.build([b.linear(b.flatten(b.max_pool2d(x, 3)), weight(2, 4), 0.1)])
    with pytest.raises(ValueError, match=r"^inputs: the image is too small for the network"):
        int8_graph([torch.randn(1, 4, 2, 2)], head)
    with pytest.raises(ValueError, match=r"^inputs: 8 channels where a layer takes 4: the image has another size"):
        int8_graph([torch.randn(1, 4, 3, 6)], head)
    b = Int8GraphBuilder()
    x, y = b.quantize(channels=4, scale=0.1), b.quantize(channels=4, scale=0.1)
    both = b.build([b.add(x, y, output_scale=0.1)])
    with pytest.raises(ValueError, match="the terms of a sum differ"):
        int8_graph([torch.randn(1, 4, 2, 2), torch.randn(1, 4, 3, 3)], both)


def test_zero_points_of_numpy_are_as_good_as_integers() -> None:
    programs = []
    for kind in (int, np.uint8):
        b = Int8GraphBuilder()
        x = b.quantize(channels=4, scale=0.1, zero_point=kind(200))
        y = b.conv2d(x, torch.ones(4, 4, 1, 1, dtype=torch.int8), 0.1, output_scale=0.1, output_zero_point=kind(129))
        programs.append(b.build([y]))
    assert torch.equal(programs[0].plan, programs[1].plan)


@pytest.mark.skipif(BACKEND != "native", reason="the other backends read plans in Python")
def test_broken_plans_are_refused(rng: np.random.Generator) -> None:
    """A plan is data: whatever stands in it, the runner raises or answers, and never reads out of bounds."""
    program = network("float")
    inputs = operands(1, 9, 9)
    op = torch.ops.imgopt_fast.int8_graph.default
    outputs = list(program.outputs)
    refused = 0
    for _ in range(300):
        plan = program.plan.clone()
        plan[int(rng.integers(len(plan)))] = int(rng.choice([-1, 0, 1, 7, 1 << 20, -(1 << 62), 1 << 62]))
        try:
            op(inputs, plan, program.constants, program.packed, outputs)
        except RuntimeError:
            refused += 1
    assert refused > 100
    with pytest.raises(RuntimeError, match="plan"):
        op(inputs, program.plan[:50], program.constants, program.packed, outputs)
    with pytest.raises(RuntimeError, match="constants"):
        op(inputs, program.plan, program.constants[:100], program.packed, outputs)


def test_repack_follows_the_active_isa(isa: str) -> None:
    program = repack(network("float"))
    inputs = operands(1, 7, 7)
    other = _native.supported_isas()[0]
    expected = expect(program, inputs)
    assert_same(int8_graph(inputs, program), expected)
    _native.set_isa(other)
    assert_same(int8_graph(inputs, program), expected)
