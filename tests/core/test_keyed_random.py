"""Keyed randomness against a Philox written here from its definition."""

import math

import numpy as np
import pytest
import torch

from ncsn.core.keyed_random import keyed_normal, keyed_permutation, keyed_uniform

MASK = 2**64 - 1


def philox4x64(counter: int, key: int) -> list[int]:
    """Ten rounds of Philox4x64 (Salmon et al. 2011) in plain Python."""
    c = [(counter >> 64 * i) & MASK for i in range(4)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        low, high = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(high >> 64) ^ c[1] ^ k[0], high & MASK, (low >> 64) ^ c[3] ^ k[1], low & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def words(kind: int, *, seed: int, stream: int, index: int, blocks: int) -> list[int]:
    start = (kind << 192) + index * blocks + 1
    return [word for block in range(blocks) for word in philox4x64(start + block, seed + (stream << 64))]


def test_normal_is_box_muller_of_philox():
    drawn = keyed_normal(2**63 + 5, stream=7, first=3, count=1, size=11)[0]
    expected_cos, expected_sin = [], []
    for word in words(1, seed=2**63 + 5, stream=7, index=3, blocks=2)[:6]:
        radius = math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32))
        angle = 2 * math.pi * (word & 0xFFFFFFFF) / 2**32
        expected_cos.append(radius * math.cos(angle))
        expected_sin.append(radius * math.sin(angle))
    torch.testing.assert_close(drawn, torch.tensor((expected_cos + expected_sin)[:11]), rtol=1e-6, atol=1e-9)


def test_uniform_is_the_top_bits_of_philox():
    drawn = keyed_uniform(9, stream=2, first=4, count=1, size=6)[0].tolist()
    row = words(0, seed=9, stream=2, index=4, blocks=1)[:3]
    bits = [word >> 41 for word in row] + [(word >> 9) & 0x7FFFFF for word in row]
    assert drawn == [(b + 0.5) / 2**23 for b in bits]


def test_permutation_sorts_the_words_of_its_epoch():
    row = words(2, seed=4, stream=6, index=0, blocks=25)[:99]
    signed = np.array(row, dtype=np.uint64).view(np.int64)
    order = keyed_permutation(4, epoch=6, size=99)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(99), key=lambda i: signed[i])


@pytest.mark.parametrize("size", [1, 3, 785])
@pytest.mark.parametrize("draw", [keyed_normal, keyed_uniform])
def test_a_row_does_not_depend_on_the_rows_drawn_with_it(draw, size):
    whole = draw(3, stream=5, first=10, count=12, size=size)
    assert whole.shape == (12, size) and whole.dtype == torch.float32 and whole.is_contiguous()
    parts = [draw(3, stream=5, first=first, count=count, size=size) for first, count in [(10, 1), (11, 6), (17, 5)]]
    assert torch.equal(whole, torch.cat(parts))
    assert draw(3, stream=5, first=10, count=0, size=size).shape == (0, size)
