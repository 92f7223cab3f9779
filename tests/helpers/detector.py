"""Random Mask2Formers, saved as transformers saves them."""

import torch


def save_mask2former(path, labels, seed=0):
    """A Mask2Former of 32 channels with these labels, its queries made sure of themselves."""
    import transformers

    torch.manual_seed(seed)
    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=12,
        id2label=dict(enumerate(labels)),
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # random queries are unsure of their label and alike in every image
        model.class_predictor.weight.normal_(0, 1.0)
        model.class_predictor.bias[-1] = -3.0
    model.save_pretrained(path)
    transformers.Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, num_labels=len(labels)).save_pretrained(
        path
    )
    return path


def save_large_mask2former(path, labels):
    """A Mask2Former of the sizes of its authors' largest for COCO, on a Swin-L."""
    import transformers

    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=384, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_queries=200, id2label=dict(enumerate(labels)))
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    sizes = {"shortest_edge": 800, "longest_edge": 1333}
    transformers.Mask2FormerImageProcessorPil(size=sizes, num_labels=len(labels)).save_pretrained(path)
    return path
