"""Quantization-aware training, and the simulation it trains through: what the kernels compute."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from quantized_networks import NETWORKS, decibels, network, planned, quantized

from imgopt_fast.compress.quantize import QatModel, qat
from imgopt_fast.compress.quantize.calibrate import Scale
from imgopt_fast.compress.quantize.simulate import Simulation, fake_quantize


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_do_what_the_simulation_does(name):
    """An oracle that shares no arithmetic with the kernels: float convolutions of rounded values."""
    _, images = network(name)
    with torch.no_grad():
        simulated = Simulation(planned(name))(images)
    # A value on a rounding boundary may fall to the other side, because float sums are not exact.
    assert decibels(quantized(name)(images), simulated) > 60


def test_qat_trains_and_converts_without_changing_a_bit():
    model, images = network("inverted")
    images = images[:16]
    target = torch.randint(5, (len(images),))
    trained = qat(model, [images]).train()
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(trained(images), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    trained.eval()
    result = trained(images)
    assert torch.equal(result, trained.convert()(images))
    assert torch.equal(result, copy.deepcopy(trained)(images))
    with torch.no_grad():
        assert decibels(trained.train()(images), result) > 40


def test_qat_state_restores_the_network():
    _, images = network("residual")
    trained, other = QatModel(planned("residual")).eval(), QatModel(planned("residual")).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    assert not torch.equal(trained(images), other(images))
    other.load_state_dict(trained.state_dict())
    assert torch.equal(trained(images), other(images))


def test_qat_evaluates_the_weights_that_it_has():
    """However they were written: `.data` changes neither the parameter nor its version."""
    _, images = network("residual")
    trained = QatModel(planned("residual")).eval()
    before = trained(images)
    for write in (lambda p: p.data.mul_(1.1), lambda p: setattr(p, "data", p.data * 1.1)):
        for parameter in trained.parameters():
            write(parameter)
        after = trained(images)
        assert not torch.equal(after, before)
        assert torch.equal(after, trained.convert()(images))
        before = after
    converted = trained._int8[1]
    trained(images[:2])
    assert trained._int8[1] is converted, "nothing changed, nothing is converted"


def test_qat_says_how_to_save_it():
    with pytest.raises(TypeError, match=r"does not pickle: save its state_dict\(\).* convert\(\)"):
        pickle.dumps(QatModel(planned("residual")))


def test_qat_gradient_is_straight_through_and_stops_at_saturation():
    values = torch.tensor([-3.0, 0.26, 0.99, 30.0], requires_grad=True)
    rounded = fake_quantize(values, Scale(0.1, 10))
    assert rounded.tolist() == pytest.approx([-1.0, 0.3, 1.0, 24.5])
    rounded.sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
