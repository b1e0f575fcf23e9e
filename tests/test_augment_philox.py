"""The counter-based generator: published vectors, NumPy's Philox at its other width, and the layout of the counter."""

import numpy as np
import pytest

from imgopt_fast.augment import philox

MULTIPLIERS = {32: (0xD2511F53, 0xCD9E8D57), 64: (0xD2E7470EE14C6C93, 0xCA5A826395121157)}
WEYL = {32: (0x9E3779B9, 0xBB67AE85), 64: (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)}


def oracle(counter: list[int], key: list[int], width: int) -> list[int]:
    """Philox4xW-10 in Python's integers, as the paper writes it."""
    mask = (1 << width) - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = MULTIPLIERS[width][0] * c[0], MULTIPLIERS[width][1] * c[2]
        c = [product1 >> width ^ c[1] ^ k[0], product1 & mask, product0 >> width ^ c[3] ^ k[1], product0 & mask]
        k = [(k[i] + WEYL[width][i]) & mask for i in range(2)]
    return c


def generate(counter: list[int], key: list[int]) -> list[int]:
    even = np.array([counter[0], counter[2]], np.uint64).reshape(2, 1, 1)
    odd = np.array([counter[1], counter[3]], np.uint64).reshape(2, 1, 1)
    even, odd = philox.philox4x32(even, odd, key[0] | key[1] << 32)
    return [int(even[0, 0, 0]), int(odd[0, 0, 0]), int(even[1, 0, 0]), int(odd[1, 0, 0])]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors published with the algorithm
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert generate(counter, key) == expected
    assert oracle(counter, key, 32) == expected


def test_oracle_agrees_with_numpy_at_64_bits(rng):
    for _ in range(5):
        counter = [int(v) for v in rng.integers(1, 2**63, 4)]
        key = [int(v) for v in rng.integers(0, 2**63, 2)]
        generator = np.random.Philox(counter=counter, key=key)
        counter[0] += 1  # NumPy counts up before it generates
        assert [int(v) for v in generator.random_raw(4)] == oracle(counter, key, 64)


def test_uniforms_follow_the_documented_counter(rng):
    seed, epoch = int(rng.integers(0, 2**63)), 7
    index = rng.integers(0, 2**40, 5)
    blocks = np.array([0, 3, 5 << philox.BLOCK_BITS], np.uint64)
    u = philox.uniforms(seed, epoch, index, blocks)
    assert u.shape == (12, 5)
    for b, block in enumerate(blocks):
        for n, i in enumerate(index):
            words = oracle([int(i) & 0xFFFFFFFF, int(i) >> 32, epoch, int(block)], [seed & 0xFFFFFFFF, seed >> 32], 32)
            assert list(u[4 * b : 4 * b + 4, n]) == [w / 2**32 for w in words]


@pytest.mark.parametrize("samples", [0, 1, 31, 32, 33, 500])
def test_compiled_numbers_are_numpys(samples, rng):
    index = rng.integers(-(2**62), 2**62, samples)
    blocks = np.array([0, 1, 9 << philox.BLOCK_BITS, 2**32 - 1], np.uint64)
    for seed, epoch in ((0, 0), (2**64 - 1, 2**32 - 1), (2**70 + 5, 2**33 + 1), (-3, -1)):
        words = index.astype(np.uint64)
        expected = philox.uniforms_in_numpy(seed, epoch, words, blocks)
        assert np.array_equal(philox.uniforms(seed, epoch, index[::-1], blocks)[:, ::-1], expected)
    assert philox.uniforms(1, 2, index, blocks[:0]).shape == (0, samples)


def test_uniforms_are_uniform_and_uncorrelated():
    u = philox.uniforms(11, 0, np.arange(20000), np.array([0, 1], np.uint64))
    assert u.min() >= 0
    assert u.max() < 1
    for row in u:
        counts = np.histogram(row, 50, (0, 1))[0]
        chi_squared = ((counts - 400) ** 2 / 400).sum()
        assert chi_squared < 100  # 49 degrees of freedom: P < 2e-5
    correlation = np.corrcoef(np.concatenate([u, philox.uniforms(12, 0, np.arange(20000), np.array([0], np.uint64))]))
    np.fill_diagonal(correlation, 0)
    assert abs(correlation).max() < 5 / np.sqrt(20000)


def test_blocks_of():
    assert philox.blocks_of(0, 0) == []
    assert philox.blocks_of(2, 5) == [2 << 20, 2 << 20 | 1]
    assert philox.blocks_of(1, 4, first=3) == [1 << 20 | 3]
    with pytest.raises(ValueError, match="position"):
        philox.blocks_of(1 << 12, 1)
    with pytest.raises(ValueError, match="may draw"):
        philox.blocks_of(0, (4 << 20) + 1)
