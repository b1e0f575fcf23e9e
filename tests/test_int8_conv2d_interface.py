"""int8_conv2d as torch's machinery, careless callers and NumPy see it: packing, prepared calls, error messages."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKEND
from conv_problems import GEOMETRIES, layer, operation_arguments, random_bytes

import imgopt_fast
from imgopt_fast import _native
from imgopt_fast._prepared import MOST_CALLS
from imgopt_fast.ops import int8_conv2d as op


def test_numpy_face(rng: np.random.Generator) -> None:
    import imgopt_fast.numpy as face

    for geometry in GEOMETRIES[:1] + GEOMETRIES[5:10]:
        for shift in (False, True):
            x, weight, bias, settings = layer(
                rng, **geometry, with_residual=True, power_of_two=shift, input_dtype=torch.int8
            )
            settings |= {"output_min": -2.0, "requantize": "shift" if shift else "float"}
            expected = imgopt_fast.int8_conv2d(x, weight, bias, **settings).permute(0, 2, 3, 1).numpy()
            settings |= {
                "weight_scale": settings["weight_scale"].numpy(), "output_dtype": "uint8",
                "residual": settings["residual"].permute(0, 2, 3, 1).numpy(),
            }  # fmt: skip
            found = face.int8_conv2d(x.permute(0, 2, 3, 1).numpy(), weight.numpy(), bias.numpy(), **settings)
            np.testing.assert_array_equal(found, expected)
            own = ("input_scale", "input_zero_point", "weight_scale", "groups")
            about_weight = {name: settings.pop(name) for name in own}
            packed = face.pack_int8_weight(weight.numpy(), bias=bias.numpy(), **about_weight)
            moved = packed._replace(packed=np.concatenate([packed.packed[:1], packed.packed])[1:])  # not aligned
            for layer_weight in (packed, packed, pickle.loads(pickle.dumps(packed)), moved):
                found = face.int8_conv2d(x.permute(0, 2, 3, 1).numpy(), layer_weight, **settings)
                np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="weight: is packed"):
        face.int8_conv2d(x.permute(0, 2, 3, 1).numpy(), packed, groups=2)
    image = np.zeros((1, 2, 2, 4), np.uint8)
    kernel = np.ones((3, 4, 1, 1), np.int8)
    assert face.int8_conv2d(image, kernel, input_scale=1.0, weight_scale=1.0).dtype == np.float32
    with pytest.raises(ValueError, match=r"weight_scale: .* output channel 1"):
        face.int8_conv2d(image, kernel, input_scale=1.0, weight_scale=np.array([1.0, 0.0, 1.0]))
    for dtype in (np.uint8, "nonsense"):
        with pytest.raises(ValueError, match="output_dtype: expected float32 without output_scale"):
            face.int8_conv2d(image, kernel, input_scale=1.0, weight_scale=1.0, output_dtype=dtype)
    with pytest.raises(TypeError, match="bias: expected an array of floats"):
        face.int8_conv2d(image, kernel, [0.0] * 3, input_scale=1.0, weight_scale=1.0)
    with pytest.raises(TypeError, match="input: expected a uint8 or int8 array"):
        face.int8_conv2d(image.astype(np.int32), kernel, input_scale=1.0, weight_scale=1.0)


def test_zero_points_and_scales_of_numpy_are_as_good_as_numbers(rng: np.random.Generator) -> None:
    import imgopt_fast.numpy as face

    x = torch.from_numpy(rng.integers(0, 256, (1, 8, 5, 5), dtype=np.uint8))
    weight = torch.from_numpy(rng.integers(-127, 128, (8, 8, 1, 1), dtype=np.int8))
    zero_points = {"input_zero_point": 200, "output_zero_point": 129, "residual_zero_point": 131}
    scales = {"input_scale": 0.5, "weight_scale": 0.25, "output_scale": 64.0, "residual_scale": 8.0}
    expected = imgopt_fast.int8_conv2d(x, weight, residual=x, **zero_points, **scales)
    small: dict[str, Any] = {name: np.uint8(value) for name, value in zero_points.items()}
    small |= {name: np.float32(value) for name, value in scales.items()}
    assert torch.equal(imgopt_fast.int8_conv2d(x, weight, residual=x, **small), expected)
    image = x.permute(0, 2, 3, 1).numpy()
    found = face.int8_conv2d(image, weight.numpy(), residual=image, **small)
    np.testing.assert_array_equal(found, expected.permute(0, 2, 3, 1).numpy())


def test_packed_weight_of_another_isa_is_packed_anew(isa: str, rng: np.random.Generator) -> None:
    x, weight, bias, settings = layer(rng, c=32, o=48)
    expected = imgopt_fast.int8_conv2d(x, weight, bias, **settings)
    own = ("input_scale", "input_zero_point", "weight_scale", "groups")
    rest = {name: value for name, value in settings.items() if name not in own}
    packed = imgopt_fast.pack_int8_weight(
        weight, settings["weight_scale"], bias, input_scale=settings["input_scale"],
        input_zero_point=settings["input_zero_point"],
    )  # fmt: skip
    packed = pickle.loads(pickle.dumps(packed))
    assert packed.packed.numel() > weight.numel()
    for other in _native.supported_isas():
        _native.set_isa(other)
        assert torch.equal(imgopt_fast.int8_conv2d(x, packed, **rest), expected)
    truncated = packed._replace(packed=packed.packed[:-1].clone())
    assert torch.equal(imgopt_fast.int8_conv2d(x, truncated, **rest), expected)


def test_equal_weights_are_packed_into_equal_bytes(isa: str, rng: np.random.Generator) -> None:
    for geometry in [{"c": 32, "o": 48}, {"c": 64, "o": 16, "k": (1, 1)}, *GEOMETRIES]:
        _, weight, bias, settings = layer(rng, **geometry)
        own = {name: settings[name] for name in ("weight_scale", "input_scale", "input_zero_point", "groups")}
        for some in (weight, weight // 8):  # of these, AVX2 multiplies bytes
            found = []
            for value in (0, 255):  # in the memory that is packed into next
                size = imgopt_fast.pack_int8_weight(some, bias=bias, **own).packed.numel()
                torch.full((size,), value, dtype=torch.uint8)
                found.append(imgopt_fast.pack_int8_weight(some, bias=bias, **own).packed)
            assert torch.equal(*found), geometry


def test_opcheck_compile_and_export(rng: np.random.Generator) -> None:
    x, weight, bias, settings = layer(rng, c=8, o=16, with_residual=True)
    packed = imgopt_fast.pack_int8_weight(
        weight, settings["weight_scale"], bias, input_scale=settings["input_scale"],
        input_zero_point=settings["input_zero_point"],
    )  # fmt: skip
    arguments = operation_arguments(x, packed, settings)
    torch.library.opcheck(torch.ops.imgopt_fast.int8_conv2d.default, arguments)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = imgopt_fast.int8_conv2d(x, packed, output_scale=0.7, output_zero_point=9, padding=(1, 2), stride=2)
            return imgopt_fast.int8_conv2d(  # unpacked: the checks of values are left out while tracing
                y, weight.view(8, 16, 3, 3), input_scale=0.7, input_zero_point=9, weight_scale=0.5
            )

    expected = Layer()(x)
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(Layer(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    more = torch.cat([x, x.flip(0)])
    assert torch.equal(exported.module()(more), Layer()(more))


def test_a_call_that_was_made_before_is_found_by_all_of_its_arguments(rng: np.random.Generator) -> None:
    """Calls that differ in one argument, twice in turns, each against the unpacked weight, which remembers nothing."""
    x, weight, bias, _ = layer(rng, c=8, o=16, h=9, w=9)
    own = {"input_scale": 0.25, "input_zero_point": 3, "weight_scale": 2.0**-6}
    packed = imgopt_fast.pack_int8_weight(weight, own["weight_scale"], bias, input_scale=0.25, input_zero_point=3)
    usual: dict[str, Any] = {"output_scale": 1.0, "padding": 1}
    extra = {"residual_scale": 0.5, "residual": random_bytes(rng, (2, 16, 9, 9), torch.uint8)}
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (x, usual),
        (random_bytes(rng, (1, 8, 5, 6), torch.uint8), usual),
        (random_bytes(rng, (2, 8, 9, 9), torch.int8), usual),
        *((x, usual | change) for change in (
            {"output_scale": 0.5}, {"output_scale": None}, {"output_zero_point": 7}, {"output_dtype": torch.int8},
            {"stride": 2}, {"stride": [2, 1]}, {"padding": 0}, {"padding": ((1, 0), (2, 1))}, {"dilation": (1, 2)},
            {"output_min": 0.5}, {"output_max": 4.0}, {"requantize": "shift"}, extra,
            extra | {"residual_scale": 2.0}, extra | {"residual_zero_point": 9},
            extra | {"residual": extra["residual"].view(torch.int8)}, extra | {"requantize": "shift"},
        )),
    ]  # fmt: skip
    expected = [imgopt_fast.int8_conv2d(images, weight, bias, **own, **call) for images, call in calls]
    for _ in range(2):
        for (images, call), right in zip(calls, expected, strict=True):
            found = imgopt_fast.int8_conv2d(images, packed, **call)
            assert found.dtype == right.dtype
            assert torch.equal(found, right), call


@pytest.mark.skipif(BACKEND != "native", reason="only the compiled kernels prepare calls")
def test_prepared_calls_live_as_long_as_the_packed_weight(rng: np.random.Generator) -> None:
    x, weight, bias, _ = layer(rng, c=8, o=16)
    packed = imgopt_fast.pack_int8_weight(weight, 0.5, bias, input_scale=0.25)
    layers, number = op._CALLS._layers, id(packed.packed)
    for scale in range(1, 40):
        imgopt_fast.int8_conv2d(x, packed, output_scale=float(scale))
    assert 0 < len(layers[number].calls) <= MOST_CALLS
    # Another layer with the same packed bytes is another layer.
    other = packed._replace(bias=packed.bias + 100)
    for _ in range(2):
        assert torch.equal(imgopt_fast.int8_conv2d(x, other), imgopt_fast.int8_conv2d(x, packed) + 100 * 0.125)
    del packed, other
    assert number not in layers


def test_errors_of_a_call_that_was_made_before() -> None:
    packed = imgopt_fast.pack_int8_weight(torch.ones(4, 8, 3, 3, dtype=torch.int8), 0.5, input_scale=0.5)
    x = torch.zeros(1, 8, 5, 5, dtype=torch.uint8)
    residual = torch.zeros(1, 4, 3, 3, dtype=torch.uint8)
    given = {"output_scale": 1.0, "residual": residual, "residual_scale": 1.0}
    for _ in range(2):
        imgopt_fast.int8_conv2d(x, packed, output_scale=1.0)
        imgopt_fast.int8_conv2d(x, packed, **given)
        with pytest.raises(ValueError, match="input: expected at least 3 rows"):
            imgopt_fast.int8_conv2d(x[:, :, :2], packed, output_scale=1.0)
        with pytest.raises(ValueError, match=r"input: expected \(N, 8, H, W\)"):
            imgopt_fast.int8_conv2d(x[:, :7], packed, output_scale=1.0)
        with pytest.raises(ValueError, match=r"input: expected \(N, 8, H, W\)"):
            imgopt_fast.int8_conv2d(x[0], packed, output_scale=1.0)
        with pytest.raises(ValueError, match="residual: expected the output's shape"):
            imgopt_fast.int8_conv2d(x, packed, **given | {"residual": residual[:, :, :2]})
        with pytest.raises(ValueError, match="weight: is packed, so bias"):
            imgopt_fast.int8_conv2d(x, packed, output_scale=1.0, input_scale=0.5)


@pytest.mark.skipif(BACKEND != "native", reason="the operation has compiled kernels only")
def test_prepared_bytes_of_another_origin_are_refused(rng: np.random.Generator) -> None:
    x, weight, bias, _ = layer(rng, c=8, o=16)
    packed = imgopt_fast.pack_int8_weight(weight, 0.5, bias, input_scale=0.25)
    imgopt_fast.int8_conv2d(x, packed)
    (call,) = op._CALLS._layers[id(packed.packed)].calls.values()
    run = torch.ops.imgopt_fast.int8_conv2d_prepared
    run(x, packed.packed, call, None)
    longer = torch.cat([call, call[:64]])
    for broken in (call[:100], call[:-64], longer, longer[8:-56], torch.zeros_like(call), call.float()):
        with pytest.raises(RuntimeError, match="prepared"):
            run(x, packed.packed, broken, None)
    for at in range(16, 120, 8):  # geometry: a huge or negative number in every place
        for value in (-1, 2**40):
            broken = call.clone()
            broken[at : at + 8].view(torch.int64)[0] = value
            with pytest.raises(RuntimeError, match=r"prepared|packed"):
                run(x, packed.packed, broken, None)
    with pytest.raises(RuntimeError, match="packed"):
        run(x, packed.packed[:-1], call, None)
    with pytest.raises(RuntimeError, match="residual"):
        run(x, packed.packed, call, x)


GOOD: dict[str, Any] = {"input_scale": 0.5, "weight_scale": 0.5, "output_scale": 1.0}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "input: expected uint8 or int8, got torch.float32", {"input": torch.zeros(1, 8, 5, 5)}),
        (ValueError, r"input: expected \(N, 8, H, W\)", {"input": torch.zeros(1, 7, 5, 5, dtype=torch.uint8)}),
        (ValueError, "input: expected at least 3 rows", {"input": torch.zeros(1, 8, 2, 5, dtype=torch.uint8)}),
        (TypeError, "weight: expected an int8 tensor", {"weight": torch.zeros(4, 8, 3, 3)}),
        (ValueError, "weight: expected .O, C/groups", {"weight": torch.zeros(8, 3, 3, dtype=torch.int8)}),
        (ValueError, "groups: expected a divisor of the 4", {"groups": 3}),
        (ValueError, "weight_scale: .* got -1.0 for output channel 2", {"weight_scale": torch.tensor([1.0, 1, -1, 1])}),
        (ValueError, "weight_scale: expected 1 or 4 numbers", {"weight_scale": torch.ones(3)}),
        (TypeError, "weight_scale: expected a number or a tensor of floats, got list", {"weight_scale": [1.0] * 4}),
        (ValueError, "weight_scale: .* inf", {"weight_scale": torch.tensor([1.0, 1, 1, math.inf])}),
        (ValueError, "input_scale: expected a positive finite", {"input_scale": 0.0}),
        (ValueError, "input_scale: expected a positive finite", {"input_scale": math.nan}),
        (ValueError, "output_scale: expected a positive finite", {"output_scale": math.inf}),
        (ValueError, r"input_zero_point: expected an integer in \[0, 255\], got -1", {"input_zero_point": -1}),
        (ValueError, "output_zero_point: expected an integer", {"output_zero_point": 256}),
        (ValueError, "output_dtype: expected", {"output_dtype": torch.float16}),
        (ValueError, "stride: expected", {"stride": 0}),
        (ValueError, "padding: expected", {"padding": (1, 2, 3)}),
        (ValueError, "dilation: expected", {"dilation": (1, -1)}),
        (ValueError, "output_min: expected at most", {"output_min": 2.0, "output_max": 1.0}),
        (ValueError, "output_max: expected a number", {"output_max": math.nan}),
        (ValueError, "residual_scale: expected", {"residual": torch.zeros(1, 4, 3, 3, dtype=torch.uint8)}),
        (ValueError, "residual: expected a tensor", {"residual_scale": 1.0}),
        (
            ValueError,
            "residual: expected the output's shape",
            {"residual": torch.zeros(1, 4, 4, 3, dtype=torch.uint8), "residual_scale": 1.0},
        ),
        (ValueError, "bias: .* output channel 1 .* int32", {"bias": torch.tensor([0.0, 1e10, 0, 0])}),
        (ValueError, "bias: .* output channel 3", {"bias": torch.tensor([0.0, 0, 0, math.nan])}),
        (TypeError, "bias: expected a tensor of floats", {"bias": torch.zeros(4, dtype=torch.int32)}),
        (TypeError, "bias: expected a tensor of floats", {"bias": [0.0] * 4}),
        (TypeError, "input: expected a uint8 or int8 tensor, got list", {"input": [1]}),
        (TypeError, "residual: expected a uint8 or int8 tensor", {"residual": [1], "residual_scale": 1.0}),
        (ValueError, "groups: expected", {"groups": None}),
        (ValueError, "stride: expected", {"stride": 1.5}),
        (ValueError, "dilation: expected", {"dilation": None}),
        (ValueError, "padding: expected", {"padding": "same"}),
        (ValueError, "padding: expected", {"padding": ((1, 1, 1), (1,))}),
        (ValueError, "output_scale: expected", {"output_scale": "1"}),
        (ValueError, "output_zero_point: expected", {"output_zero_point": math.nan}),
        (ValueError, "output_zero_point: expected", {"output_zero_point": None}),
        (ValueError, "output_zero_point: expected", {"output_zero_point": 3.0}),
        (ValueError, "output_max: expected a number", {"output_max": "6"}),
        (ValueError, r"bias: expected \(4,\)", {"bias": torch.zeros(5)}),
        (ValueError, "requantize: expected", {"requantize": "round"}),
        (ValueError, "output_scale: expected a power of two", {"requantize": "shift", "output_scale": 3.0}),
        (
            ValueError,
            "weight_scale: .* output channel 1",
            {"requantize": "shift", "weight_scale": torch.tensor([1.0, 0.3, 1, 1])},
        ),
    ],
)
def test_errors_name_the_argument(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    settings = GOOD | {
        "input": torch.zeros(1, 8, 5, 5, dtype=torch.uint8),
        "weight": torch.ones(4, 8, 3, 3, dtype=torch.int8),
    }
    with pytest.raises(error, match=message):
        imgopt_fast.int8_conv2d(**settings | changes)


def test_sums_that_could_overflow_are_refused() -> None:
    """The bound of csrc/int8_conv2d/contract.h, on both sides of its edge."""
    weight = torch.full((2, 66_000, 1, 1), 127, dtype=torch.int8)
    imgopt_fast.pack_int8_weight(weight, 1.0, input_scale=1.0)
    weight[1] = -128
    with pytest.raises(ValueError, match="output channel 1"):
        imgopt_fast.pack_int8_weight(weight, 1.0, input_scale=1.0)
    # Either dtype's inputs may be added up, no input has the lowest value of one and the highest of the other.
    alternating = torch.tensor([127, -127], dtype=torch.int8).repeat(50_000).view(1, -1, 1, 1)
    imgopt_fast.pack_int8_weight(alternating, 1.0, input_scale=1.0)
    limit = weight[:1, :8].contiguous()
    edge = float(2**31 - 1 - 127 * 8 * 255)
    imgopt_fast.pack_int8_weight(limit, 1.0, torch.tensor([edge], dtype=torch.float64), input_scale=1.0)
    with pytest.raises(ValueError, match="output channel 0"):
        imgopt_fast.pack_int8_weight(limit, 1.0, torch.tensor([edge + 1], dtype=torch.float64), input_scale=1.0)


def test_packed_weight_refuses_its_own_arguments() -> None:
    packed = imgopt_fast.pack_int8_weight(torch.ones(4, 8, 3, 3, dtype=torch.int8), 0.5, input_scale=0.5)
    x = torch.zeros(1, 8, 5, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="weight: is packed"):
        imgopt_fast.int8_conv2d(x, packed, input_scale=0.5, output_scale=1.0)
    with pytest.raises(ValueError, match="input_zero_point"):
        imgopt_fast.int8_conv2d(x, packed._replace(input_zero_point=-3), output_scale=1.0)
