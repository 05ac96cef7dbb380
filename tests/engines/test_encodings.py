"""How values travel: exactly, or with an error that theory bounds, in as many bytes as the sizes say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyrank.core.rng import stream, torch_generator
from polyrank.engines.encodings import BLOCK, CODECS, NF4, Encoding, relative_error

ENCODINGS: list[Encoding] = ["bfloat16", "float32", "int8", "nf4"]
BY_BLOCK: dict[Encoding, float] = {"int8": 0.5 / 127, "nf4": float((NF4[1:] - NF4[:-1]).max()) / 2}
"""Half the widest gap between two codes: the most that a value is off, as a share of its block's largest."""

SHAPES = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.sampled_from([0, 1, 2, 63, 64, 65, 128, 200])),
        st.tuples(st.integers(0, 9), st.integers(1, 40)),
    ),
    max_size=6,
)


def drawn(shapes: list[tuple[int, ...]], seed: int, size: float = 1.0) -> list[Tensor]:
    generator = torch_generator(stream(seed, "encodings"))
    return [torch.randn(shape, generator=generator) * size for shape in shapes]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_table_is_tested_whole(encoding: Encoding) -> None:
    assert sorted(CODECS) == ENCODINGS
    assert CODECS[encoding].exact == (encoding == "float32")


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99), size=st.sampled_from([0.0, 1e-41, 1e-30, 1e-3, 1.0, 1e4, 1e30]))
def test_what_is_packed_is_what_the_layout_says_and_comes_back(
    encoding: Encoding, shapes: list[tuple[int, ...]], seed: int, size: float
) -> None:
    codec, tensors = CODECS[encoding], drawn(shapes, seed, size)
    before = [x.clone() for x in tensors]
    sizes = [x.numel() for x in tensors]
    parts = codec.pack(tensors)
    assert {name: (part.dtype, part.numel()) for name, part in parts.items()} == codec.layout(sizes)
    assert all(part.ndim == 1 and part.is_contiguous() for part in parts.values())
    assert sum(part.numel() * part.element_size() for part in parts.values()) == codec.nbytes(sizes)
    received = codec.unpack(parts, sizes)
    assert [(y.dtype, tuple(y.shape)) for y in received] == [(torch.float32, (n,)) for n in sizes]
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert len({y.untyped_storage().data_ptr() for y in received if y.numel()}) == sum(n > 0 for n in sizes)
    for x, y in zip(tensors, received, strict=True):
        bound(encoding, x.flatten(), y)
    again = codec.unpack(codec.pack(received), sizes)
    if encoding in ("float32", "bfloat16"):
        assert all(torch.equal(x, y) for x, y in zip(received, again, strict=True))


def bound(encoding: Encoding, x: Tensor, y: Tensor) -> None:
    """Value by value, what an encoding may be off by; float32's own rounding is allowed for."""
    tiny = 2 * torch.finfo(torch.float32).smallest_normal
    if encoding == "float32":
        assert torch.equal(x, y)
    elif encoding == "bfloat16":  # 8 bits of mantissa, the first of them not stored
        assert bool(((x - y).abs() <= x.abs() * 2.0**-8 + tiny).all())
    else:
        for a, b in zip(x.split(BLOCK), y.split(BLOCK), strict=True):
            if a.numel():
                largest = float(a.abs().max())
                assert float((a.double() - b.double()).abs().max()) <= BY_BLOCK[encoding] * largest * 1.0001 + tiny


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_values_that_codes_name_are_exact(encoding: Encoding) -> None:
    """Zero, and the largest of a block; so nothing that did not move is moved, and no message grows."""
    x = torch.zeros(3 * BLOCK + 5)
    x[7], x[BLOCK] = 0.5, -2.0 if encoding == "nf4" else 1.25
    (y,) = CODECS[encoding].unpack(CODECS[encoding].pack([x]), [x.numel()])
    assert torch.equal(x, y)


def test_a_block_is_not_disturbed_by_another() -> None:
    """One huge value costs the resolution of its own block alone, and none of the next tensor's."""
    small = drawn([(BLOCK,)], 1)[0]
    spoiled = torch.cat([small, torch.tensor([1e30])])
    for encoding in ("int8", "nf4"):
        codec = CODECS[encoding]
        (alone,) = codec.unpack(codec.pack([small]), [BLOCK])
        beside, _ = codec.unpack(codec.pack([small, torch.tensor([1e30])]), [BLOCK, 1])
        (within,) = codec.unpack(codec.pack([spoiled]), [BLOCK + 1])
        assert torch.equal(alone, beside)
        assert torch.equal(alone, within[:BLOCK])


@pytest.mark.parametrize(
    ("encoding", "low", "high"), [("bfloat16", 1e-3, 2.5e-3), ("int8", 4e-3, 7e-3), ("nf4", 0.08, 0.1)]
)
def test_the_error_on_normal_values_is_that_of_theory(encoding: Encoding, low: float, high: float) -> None:
    """int8: a code is off by 1 / sqrt(12) of a step, a step is max / 127, and of 64 normal values max is near 2.5.

    bfloat16: a mantissa of 8 bits is off by 2^-9 / sqrt(3) to 2^-8 / sqrt(3) of the value; nf4: about 9 %, as QLoRA's.
    """
    tensors = drawn([(64, 256), (512, 8)], 2)
    codec = CODECS[encoding]
    received = codec.unpack(codec.pack(tensors), [x.numel() for x in tensors])
    found = relative_error(tensors, received)
    assert low < found < high
    flat, back = torch.cat([x.flatten() for x in tensors]).double(), torch.cat(received).double()
    assert found == pytest.approx(float((flat - back).norm() / flat.norm()), rel=1e-4)
    if encoding == "int8":
        step = torch.cat([x.flatten() for x in tensors]).view(-1, BLOCK).abs().amax(1).square().mean().sqrt() / 127
        assert found == pytest.approx(float(step) / math.sqrt(12), rel=0.05)


def test_the_error_of_nothing_is_nothing() -> None:
    assert relative_error([], []) == 0
    assert relative_error([torch.zeros(3)], [torch.zeros(3)]) == 0
    assert relative_error([torch.zeros(2)], [torch.tensor([3.0, 4.0])]) == 5


@pytest.mark.parametrize(
    ("encoding", "share"), [("float32", 1.0), ("bfloat16", 0.5), ("int8", 0.2657), ("nf4", 0.1407)]
)
def test_bytes_as_a_share_of_float32(encoding: Encoding, share: float) -> None:
    """At the shapes of MiniLM: rank 8 on modules of 384 x 384."""
    sizes = [8 * 384] * 24 + [384 * 384, 384, 384 * 2, 2]
    found = CODECS[encoding].nbytes(sizes) / (4 * sum(sizes))
    assert found == pytest.approx(share, rel=1e-3)
    if encoding == "int8":
        assert found < 0.3
