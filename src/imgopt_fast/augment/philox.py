"""The random numbers of the augmentations: Philox4x32-10, a counter-based generator, vectorised over samples.

A counter-based generator is a function, not a state: the numbers of a sample follow from (seed, epoch, sample index,
place in the pipeline) alone, so they are the same whatever the batch size, the order, the number of workers or the
device. Algorithm: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. One call
draws for every transform of a pipeline at once. csrc/philox does it in 3 µs for four blocks of 64 samples; NumPy, which
serves where that is missing and says what the numbers are, takes 45, most of it overhead per operation.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from imgopt_fast import _native

WORDS_PER_BLOCK = 4
BLOCK_BITS = 20  # a transform owns 2^20 blocks of 4 words: more than the noise of a 1024×1024 RGB patch needs

_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64).reshape(2, 1, 1)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, in units of 2^-32
_WORD = 0xFFFFFFFF
_SEED = (1 << 64) - 1
_MASK = np.uint64(_WORD)
_SHIFT = np.uint64(32)
_UNIT = 2.0**-32

Words = NDArray[np.uint64]


def uniforms(seed: int, epoch: int, index: NDArray[np.integer], blocks: Words) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2^-32: (4·B, N) for B `blocks` (the counter's last word) and N sample indices.

    The counter is (index low, index high, epoch, block); rows 4·b to 4·b + 3 hold the words of block b.
    """
    samples = index.astype(np.uint64)
    compiled = _native.core()
    if compiled is not None and _native.backend() == "native":
        numbers: NDArray[np.float64] = compiled.philox_uniforms(seed & _SEED, epoch & _WORD, samples, blocks)
        return numbers
    return uniforms_in_numpy(seed, epoch, samples, blocks)


def uniforms_in_numpy(seed: int, epoch: int, samples: Words, blocks: Words) -> NDArray[np.float64]:
    """What `uniforms` returns, without compiled code."""
    shape = (2, blocks.size, samples.size)
    even, odd = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
    even[0], odd[0] = samples & _MASK, samples >> _SHIFT
    even[1], odd[1] = epoch & _WORD, blocks[:, None]
    even, odd = philox4x32(even, odd, seed)
    words = np.empty((blocks.size, WORDS_PER_BLOCK, samples.size))
    words[:, 0], words[:, 1], words[:, 2], words[:, 3] = even[0], odd[0], even[1], odd[1]
    words *= _UNIT
    return words.reshape(blocks.size * WORDS_PER_BLOCK, samples.size)


def philox4x32(even: Words, odd: Words, seed: int) -> tuple[Words, Words]:
    """Ten rounds over counters (c0, c1, c2, c3), given as `even` = (c0, c2) and `odd` = (c1, c3), each (2, B, N).

    Words are 32 bits wide and held in uint64, so that a product keeps both halves. `seed` is the 64-bit key.
    Returns the four random words in the same arrangement.
    """
    for key in _round_keys(seed):
        product = even * _MULTIPLIERS
        even = (product >> _SHIFT)[::-1] ^ odd
        even ^= key
        product &= _MASK
        odd = product[::-1]
    return even, odd


def blocks_of(position: int, words: int, first: int = 0) -> list[int]:
    """The counter's last word for every block that holds `words` numbers of the transform at `position`."""
    count = -(-words // WORDS_PER_BLOCK)
    if not 0 <= position < 1 << (32 - BLOCK_BITS):
        raise ValueError(f"position must be in [0, {1 << (32 - BLOCK_BITS)}), got {position}")
    if first + count > 1 << BLOCK_BITS:
        raise ValueError(f"a transform may draw {WORDS_PER_BLOCK << BLOCK_BITS} numbers per sample, got {words}")
    return [position << BLOCK_BITS | block for block in range(first, first + count)]


@lru_cache(maxsize=16)
def _round_keys(seed: int) -> tuple[Words, ...]:
    low, high = seed & _WORD, seed >> 32 & _WORD
    return tuple(
        np.array([(low + i * _WEYL[0]) & _WORD, (high + i * _WEYL[1]) & _WORD], np.uint64).reshape(2, 1, 1)
        for i in range(_ROUNDS)
    )
