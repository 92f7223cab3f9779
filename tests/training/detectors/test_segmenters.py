"""Segmentation models of transformers as detectors: each saved small and random, loaded, and compared with itself."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.detectors.base import Detector
from grounded_diffusion.training.detectors.open import open_segmenter

LABELS = {0: "dog", 1: "airplane", 2: "potted-plant"}
SWIN = dict(image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2)
OUT = ["stage1", "stage2", "stage3", "stage4"]


def swin():
    return transformers.SwinConfig(out_features=OUT, **SWIN)


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6, id2label=LABELS,
    )  # fmt: skip
    processor = transformers.Mask2FormerImageProcessorPil(size={"height": 48, "width": 48}, num_labels=3)
    return transformers.Mask2FormerForUniversalSegmentation(config), processor


def maskformer():
    decoder = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=transformers.ResNetConfig(), d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        num_queries=6,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(out_features=OUT, **SWIN), decoder_config=decoder, fpn_feature_size=32,
        mask_feature_size=32, id2label=LABELS,
    )  # fmt: skip
    processor = transformers.MaskFormerImageProcessorPil(size={"height": 48, "width": 48}, num_labels=3)
    return transformers.MaskFormerForInstanceSegmentation(config), processor


def detr():
    sizes = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic")
    backbone = transformers.ResNetConfig(out_features=OUT, **sizes)
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=8, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=6, id2label=LABELS,
    )  # fmt: skip
    processor = transformers.DetrImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 80})
    return transformers.DetrForSegmentation(config), processor


def segformer():
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        id2label=LABELS,
    )  # fmt: skip
    processor = transformers.SegformerImageProcessorPil(size={"height": 64, "width": 64})
    return transformers.SegformerForSemanticSegmentation(config), processor


def upernet():
    backbone = transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=OUT)
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, id2label=LABELS
    )
    processor = transformers.SegformerImageProcessorPil(size={"height": 64, "width": 64})
    return transformers.UperNetForSemanticSegmentation(config), processor


@pytest.fixture(scope="module", params=[mask2former, maskformer, detr, segformer, upernet], ids=lambda f: f.__name__)
def saved(request, tmp_path_factory):
    """(folder, model) of one kind."""
    torch.manual_seed(0)
    model, processor = request.param()
    folder = tmp_path_factory.mktemp("detector")
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8)


def test_findings_are_what_the_model_itself_says(saved, images):
    folder, model = saved
    segmenter = open_segmenter(str(folder))
    assert dict(segmenter.labels) == LABELS
    found = segmenter.segment(images, [LABELS.keys()] * 3)
    inputs = segmenter.processor(list(images), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    size = images.shape[1:3]
    for b, instances in enumerate(found):
        if "logits" in outputs and "pred_masks" not in outputs:
            classes = F.interpolate(outputs.logits, size, mode="bilinear")[b].argmax(0).numpy()
            assert {one.label for one in instances} == set(np.unique(classes))
            assert all(np.array_equal(one.mask, classes == one.label) for one in instances)
        else:
            logits = outputs.logits if "logits" in outputs else outputs.class_queries_logits
            masks = outputs.pred_masks if "pred_masks" in outputs else outputs.masks_queries_logits
            labels, drawn = logits[b].argmax(-1), F.interpolate(masks, size, mode="bilinear")[b] > 0
            wanted = (labels < 3) & drawn.flatten(1).any(1)
            assert len(instances) == wanted.sum()
            assert sum(one.mask.sum() for one in instances) == pytest.approx(drawn[wanted].sum().item(), rel=0.01)
        assert all(a.score >= b.score for a, b in pairwise(instances))


def test_only_wanted_labels_come_back(saved, images):
    segmenter = open_segmenter(str(saved[0]))
    some, none = segmenter.segment(images[:2], [{1}, set()])
    assert {one.label for one in some} <= {1}
    assert none == []


def test_the_same_weights_say_the_same_of_themselves(saved):
    folder, model = saved
    first, second = open_segmenter(str(folder)), open_segmenter(str(folder))
    assert first.about == second.about
    assert first.about["detector"] == model.config.model_type
    assert json.dumps(first.about)


def test_a_detector_joins_what_it_was_told_to(saved, images):
    segmenter = open_segmenter(str(saved[0]))
    found = segmenter.segment(images, [{0, 1}] * 3)
    detector = Detector(segmenter, ["dog", "aeroplane"], score=0)
    for b, detection in enumerate(detector.detect(images, [["aeroplane", "dog"]] * 3)):
        for mask, score, label in zip(detection.masks, detection.scores, (1, 0), strict=True):
            mine = [one for one in found[b] if one.label == label]
            assert np.array_equal(mask, np.logical_or.reduce([one.mask for one in mine] or [np.zeros((40, 56), bool)]))
            assert score == pytest.approx(mine[0].score if mine else 0)


def test_padding_is_cut_off(tmp_path):
    """A processor may pad to one size; masks must not be squeezed by that."""
    torch.manual_seed(0)
    model, _ = mask2former()
    model.eval().save_pretrained(tmp_path)
    sizes = dict(size={"height": 64, "width": 32}, pad_size={"height": 96, "width": 64})
    transformers.Mask2FormerImageProcessorPil(**sizes, num_labels=3).save_pretrained(tmp_path)
    segmenter = open_segmenter(str(tmp_path))
    outputs, cut = segmenter._run(np.zeros((1, 40, 56, 3), np.uint8))
    assert cut == (pytest.approx(64 / 96), pytest.approx(32 / 64))
    assert outputs.masks_queries_logits.shape[2:] == (24, 16)


def test_oneformer_is_told_its_task_and_fetches_nothing(tmp_path, tiny_checkpoint, images):
    torch.manual_seed(0)
    config = transformers.OneFormerConfig(
        backbone_config=swin(), hidden_dim=32, mask_dim=32, conv_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6, is_training=False, task_seq_len=77,
        text_encoder_width=32, text_encoder_context_length=77, text_encoder_vocab_size=658, query_dec_layers=1,
        id2label=LABELS,
    )  # fmt: skip
    transformers.OneFormerForUniversalSegmentation(config).eval().save_pretrained(tmp_path)
    processor = transformers.OneFormerImageProcessorPil(size={"height": 48, "width": 48}, num_labels=3)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_info_file": "coco_panoptic.json"}))
    transformers.CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer").save_pretrained(tmp_path)
    found = open_segmenter(str(tmp_path)).segment(images, [LABELS.keys()] * 3)
    assert len(found) == 3


def test_what_is_no_detector_is_refused(tmp_path, images):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_segmenter(str(tmp_path / "nothing"))
    transformers.CLIPTextConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not segment"):
        open_segmenter(str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot load the detector"):
        open_segmenter(str(tmp_path))


def test_missing_tensors_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    model, processor = segformer()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["decode_head.classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: decode_head\.classifier\.weight"):
        open_segmenter(str(tmp_path))


def test_mask_rcnn_says_what_it_needs():
    with pytest.raises(UsageError, match="mask-rcnn needs torchvision"):
        open_segmenter("mask-rcnn")
