"""The machine probe: its rates exist for every instruction set, are plausible, and order as the hardware does."""

import time

import pytest
from conftest import require

from imgopt_fast import _native

L2, L3 = 1 << 20, 8 << 20
RATES = {"fma", "int8_dot", "read_l2", "copy_l2", "read_l3", "copy_l3", "read_dram", "copy_dram"}


def measure() -> dict[str, float]:
    core = _native.core()
    assert core is not None
    rates: dict[str, float] = core.measure_rates(l2_bytes=L2, l3_bytes=L3)
    return rates


def test_every_rate_is_measured_and_plausible(isa: str) -> None:
    rates = measure()
    assert set(rates) == RATES
    # A loop that was optimised away reports a thousand times what any core does; one that was not, at least a
    # multiply-add every few cycles, emulators included.
    for name, rate in rates.items():
        assert 1e7 < rate < 2e13, f"{isa} {name}: {rate:.3g} per second"


def test_memory_is_slower_than_the_cache() -> None:
    require(_native.core() is not None, "compiled kernels")
    rates = measure()
    assert rates["read_dram"] < rates["read_l2"]


def test_wider_vectors_compute_more() -> None:
    if not {"avx2", "avx512"} <= set(_native.supported_isas()):
        pytest.skip("needs a processor with AVX2 and AVX-512")
    before = _native.active_isa()
    assert before is not None
    rates = {}
    try:
        for isa in ("scalar", "avx2", "avx512"):
            _native.set_isa(isa)
            rates[isa] = measure()
    finally:
        _native.set_isa(before)
    # vpdpbusd on 512 bits does four times the exact products of vpmaddwd on 256; the margin is for a busy machine.
    assert rates["avx512"]["int8_dot"] > 1.5 * rates["avx2"]["int8_dot"] > 1.5 * rates["scalar"]["int8_dot"]
    assert rates["avx2"]["fma"] > 1.2 * rates["scalar"]["fma"]


def test_the_probe_is_short() -> None:
    require(_native.core() is not None, "compiled kernels")
    begin = time.process_time()
    measure()
    assert time.process_time() - begin < 2.0


def test_the_loop_behind_the_int8_rate_counts_its_products(isa: str) -> None:
    core = _native.core()
    require(core is not None, "compiled kernels")
    assert core is not None
    once = core.int8_products(1)
    assert once > 0
    assert core.int8_products(1000) == 1000 * once
    for rounds in (0, 2**18 + 1):
        with pytest.raises(ValueError, match="rounds"):
            core.int8_products(rounds)


@pytest.mark.parametrize("sizes", [(0, 1 << 20), (1 << 20, 1 << 10)])
def test_impossible_caches_are_refused(sizes: tuple[int, int]) -> None:
    core = _native.core()
    require(core is not None, "compiled kernels")
    assert core is not None
    with pytest.raises(ValueError, match="l2_bytes"):
        core.measure_rates(*sizes)
