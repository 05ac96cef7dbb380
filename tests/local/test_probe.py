"""What a model says of adapters side by side and of padding, held against each alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from polyrank.data import ImageSplit, TextSplit
from polyrank.data.padding import Padding
from polyrank.local.base import Base
from polyrank.local.layout import Layout
from polyrank.local.padding import filled_up, padding_of
from polyrank.local.probe import _gradients, _job, distinct, side_by_side

SIZES = {"vocab_size": 65, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODER = {
    **SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}
RELATIVE = {"relative_attention": True, "pos_att_type": "c2p|p2c"}
TEXT = {
    "bert": lambda: transformers.BertConfig(**ENCODER),
    "deberta": lambda: transformers.DebertaConfig(**ENCODER, **RELATIVE),
    "deberta-v2": lambda: transformers.DebertaV2Config(**ENCODER, **RELATIVE, share_att_key=True, position_buckets=8),
    "longformer": lambda: transformers.LongformerConfig(**ENCODER, attention_window=8),
    "xlnet": lambda: transformers.XLNetConfig(**SIZES, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "convbert": lambda: transformers.ConvBertConfig(**ENCODER, embedding_size=32),
    "nystromformer": lambda: transformers.NystromformerConfig(**ENCODER),
}


def texts(count: int = 16) -> TextSplit:
    rng = np.random.default_rng(0)
    rows = [[2, *rng.integers(5, 60, rng.integers(4, 14)).tolist(), 3] for _ in range(count)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return TextSplit(np.concatenate(rows).astype(np.int32), offsets, rng.integers(0, 3, count), 0)


def text_base(family: str) -> Base:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(TEXT[family]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2.0)
    return Base(model, "all-linear", name=family, tokens=16)


def swin() -> Base:
    torch.manual_seed(0)
    config = transformers.Swinv2Config(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=3
    )
    return Base(transformers.AutoModelForImageClassification.from_config(config), "attention", name="swinv2")


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout(), (4, 5, 3)),
        (Layout(1), (5, 4, 3)),
        (Layout(0), (4 * 6, 5, 3)),
        (Layout(0, outer=False), (5 * 4, 3)),
        (Layout(1, outer=False), (2, 5 * 4, 3)),
    ],
)
def test_parts_are_the_examples_of_a_group_and_come_together_again(layout: Layout, shape: tuple[int, ...]) -> None:
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    slices = torch.arange(shape[layout.axis])
    owner = slices // (len(slices) // 4) if layout.outer else slices % 4
    parts = layout.parts(x, 2, 4)
    for group in range(2):
        expected = x.movedim(layout.axis, 0)[owner // 2 == group]
        assert set(parts[group].flatten().tolist()) == set(expected.flatten().tolist())
        view = layout.group(x, group, 2, 2, 4)
        assert set(view.flatten().tolist()) == set(expected.flatten().tolist())
    assert torch.equal(layout.whole(parts, x.shape[:-1], 4), x)


@pytest.mark.parametrize("family", ["deberta", "deberta-v2"])
def test_tables_of_positions_that_run_through_targets_are_named(family: str) -> None:
    reason = side_by_side(text_base(family), texts())
    assert reason is not None
    assert "does not depend on the batch" in reason


def test_a_model_that_reads_the_last_position_is_padded_on_the_left_and_turns_examples_inside() -> None:
    base = text_base("xlnet")
    data = filled_up(base, {"train": texts()}, 40)["train"]
    assert data.padding == Padding("left")
    assert side_by_side(base, data) is None
    assert Layout(1) in base.layouts.values()


def test_a_bias_of_positions_that_runs_through_targets_is_named() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    data = ImageSplit(pixels, np.arange(8) % 3, (0.5,) * 3, (0.5,) * 3)
    assert "does not depend on the batch" in str(side_by_side(swin(), data))


def test_a_model_that_fills_texts_up_by_itself_has_masks_of_other_shapes() -> None:
    """Texts of 9 and of 16 tokens become 16 both; one of 8 or fewer stays so where it is alone."""
    base, data = text_base("longformer"), texts()
    assert data.lengths.min() <= 8 < data.lengths.max()
    assert side_by_side(base, data) is None
    reason = str(side_by_side(base, data, 0.3))
    assert reason.startswith("longformer.encoder.layer.0.attention.self.query: the model itself changes how long")
    alike = replace(data, padding=Padding(width=16))
    assert side_by_side(text_base("longformer"), alike, 0.3) is None


@pytest.mark.parametrize(("family", "dropout"), [("bert", 0.0), ("bert", 0.3), ("longformer", 0.0)])
def test_adapters_side_by_side_get_the_gradients_of_each_alone(family: str, dropout: float) -> None:
    base, data = text_base(family), texts()
    assert side_by_side(base, data) is None
    assert (base.layouts != {}) == (family == "longformer")
    assert side_by_side(base, data, dropout) is None
    chosen = distinct(data, 4)
    jobs = [_job(base, client, chosen[2 * client : 2 * client + 2], dropout) for client in range(2)]
    for job, together in zip(jobs, _gradients(base, data, jobs), strict=True):
        (alone,) = _gradients(base, data, [job])
        assert alone.keys() == together.keys()
        for key, gradient in alone.items():
            torch.testing.assert_close(together[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["convbert", "nystromformer"])
def test_where_padding_leaks_every_batch_has_one_width(family: str) -> None:
    base, data = text_base(family), texts()
    settled = filled_up(base, {"train": data}, 40)["train"]
    assert settled.padding == Padding(width=40)
    assert set(settled.lengths.tolist()) == {40}
    with torch.no_grad():
        alone = base.logits(settled.batch(np.array([0])), {})
        beside = base.logits(settled.batch(np.arange(8)), {})[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)


def test_what_does_not_notice_padding_has_none_to_spare() -> None:
    assert padding_of(text_base("bert"), texts(), 40) == Padding()


def test_padding_on_the_left_keeps_every_token() -> None:
    data = texts()
    ids, mask = Padding("left", 20).rows(data.ids, data.offsets, np.arange(3), 0)
    for row, own, text in zip(ids, mask, range(3), strict=True):
        assert row[own].tolist() == data.ids[data.offsets[text] : data.offsets[text + 1]].tolist()
        assert own.tolist() == sorted(own.tolist())
        assert len(row) == 20
