"""The grounding head against a literal re-implementation of the released forward, and its identities."""

import dataclasses
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.errors import relative_l2
from torch.nn import functional as F

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.head.folded import fold
from grounded_diffusion.training.head.head import GroundingHead, HeadConfig, load_released, upsample_logits
from grounded_diffusion.training.head.taps import Taps, level_taps

SD15 = dict(
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
    cross_attention_dim=768,
    mid_block_type="UNetMidBlock2DCrossAttn",
)
SMALL = dict(  # the released layout of levels at toy widths
    SD15, block_out_channels=(32, 32, 64, 64), cross_attention_dim=24
)
RELEASED_LEVELS = (  # low, mid, high, highest
    "down_blocks.2.downsamplers.0 down_blocks.3.resnets.0 down_blocks.3.resnets.1 mid_block "
    "up_blocks.0.resnets.0 up_blocks.0.resnets.1",
    "down_blocks.1.downsamplers.0 down_blocks.2.attentions.0 down_blocks.2.attentions.1 up_blocks.0.upsamplers.0 "
    "up_blocks.1.attentions.0 up_blocks.1.attentions.1",
    "down_blocks.0.downsamplers.0 down_blocks.1.attentions.0 down_blocks.1.attentions.1 up_blocks.1.upsamplers.0 "
    "up_blocks.2.attentions.0 up_blocks.2.attentions.1",
    "conv_in down_blocks.0.attentions.0 down_blocks.0.attentions.1 up_blocks.2.upsamplers.0 "
    "up_blocks.3.attentions.0 up_blocks.3.attentions.1 up_blocks.3.attentions.2",
)


def small_config(**overrides) -> HeadConfig:
    return HeadConfig.for_unet(SMALL, reduced_channels=(4, 8, 8, 16), embed_dim=32, ffn_dim=48, **overrides)


def random_inputs(config: HeadConfig, batch: int = 2, objects: int = 3, low: int = 2, seed: int = 0):
    """Raw taps [2B,C,h,w] a level, the same arranged, queries and their validity."""
    g = torch.Generator().manual_seed(seed)
    raw = [
        [torch.randn(2 * batch, c, low << i, low << i, generator=g) for c in level]
        for i, level in enumerate(config.tap_channels)
    ]
    arranged = [
        torch.stack([torch.cat([part for tap in level for part in (tap[b], tap[batch + b])]) for b in range(batch)])
        for level in raw
    ]
    queries = torch.randn(batch, objects, config.text_dim, generator=g)
    return raw, arranged, queries, torch.ones(batch, objects, dtype=torch.bool)


def randomised(config: HeadConfig) -> GroundingHead:
    torch.manual_seed(0)
    head = GroundingHead(config)
    for name, buffer in head.named_buffers():
        if "stored" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return head.eval()


def released_forward(state, features, queries, size: int, patch: int, heads: int, upsampled: bool = False):
    """The released program's forward on one image, literally: features [1,2C,h,w] a level, queries [O,D] -> [O,H,W]."""

    def up(x, side):
        return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)

    def sn(prefix):
        weight, u = state[prefix + ".weight"], state[prefix + ".u0"]
        matrix = weight.view(weight.shape[0], -1)
        v = F.normalize(u @ matrix, eps=1e-4)
        u = F.normalize(v @ matrix.t(), eps=1e-4)
        return weight / (v @ matrix.t() @ u.t()).squeeze(), state[prefix + ".bias"]

    def mix(x, prefix):
        x = F.relu(F.batch_norm(x, None, None, None, None, True, 0.1, 1e-4))
        y = F.conv2d(x, *sn(prefix + ".conv1"), padding=1)
        y = F.relu(F.batch_norm(y, None, None, None, None, True, 0.1, 1e-4))
        return F.conv2d(y, *sn(prefix + ".conv2"), padding=1) + x

    def attention(prefix, q, kv):
        q, k, v = (x @ w.t() for x, w in zip((q, kv, kv), state[prefix + ".in_proj_weight"].chunk(3), strict=True))
        width, out = q.shape[1] // heads, []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            out.append(torch.softmax(q[:, part] @ k[:, part].t() / width**0.5, -1) @ v[:, part])
        return torch.cat(out, 1) @ state[prefix + ".out_proj.weight"].t()

    def linear(x, prefix):
        return x @ state[prefix + ".weight"].t() + state[prefix + ".bias"]

    def norm(x, prefix):
        return F.layer_norm(x, x.shape[1:], state[prefix + ".weight"], state[prefix + ".bias"])

    s = features[-1].shape[-1]
    conv = lambda name, x: F.conv2d(x, state[f"{name}_feature_conv.0.weight"])
    low = up(conv("low", up(features[0], s // 4)), s // 2)
    mid = up(mix(torch.cat([low, conv("mid", up(features[1], s // 2))], 1), "mid_feature_mix_conv"), s)
    high = mix(torch.cat([mid, conv("high", up(features[2], s))], 1), "high_feature_mix_conv")
    fused = mix(torch.cat([high, conv("highest", features[3])], 1), "highest_feature_mix_conv")
    tokens = F.unfold(up(fused, size) if upsampled else fused, patch, stride=patch)[0].t() @ state["to_k.weight"].t()
    x = queries @ state["to_q.weight"].t()
    for i in range(3):
        p = f"transfromer_decoder.layers.{i}"
        y = norm(x, p + ".norm1")
        x = x + attention(p + ".self_attn", y, y)
        x = x + attention(p + ".multihead_attn", norm(x, p + ".norm2"), tokens)
        x = x + linear(F.relu(linear(norm(x, p + ".norm3"), p + ".linear1")), p + ".linear2")
    for i in range(3):
        x = linear(x, f"mlp.layers.{i}")
        x = F.relu(x) if i < 2 else x
    return torch.einsum("od,dhw->ohw", x, up(fused, size)[0])


def test_taps_of_stable_diffusion_are_the_released_ones():
    levels = level_taps(SD15)
    assert tuple(" ".join(tap.module for tap in level) for level in levels) == RELEASED_LEVELS
    assert [2 * sum(tap.channels for tap in level) for level in levels] == [15360, 14080, 8320, 5120]


@pytest.mark.parametrize(
    ("widths", "attention", "layers"),
    [((32, 64), (False, True), 1), ((32, 32, 64), (True, True, False), (1, 2, 1)), ((32,) * 5, (True,) * 5, 1)],
)
def test_taps_of_other_unets_have_the_channels_and_sizes_promised(widths, attention, layers):
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        layers_per_block=layers,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()
    inputs = torch.randn(4, 4, 32, 32), torch.tensor(7), torch.randn(4, 5, 16)
    with torch.no_grad(), Taps(unet) as taps:
        unet(*inputs)
        raw, features = taps.raw(), taps.features()
    for level, (tensors, promised) in enumerate(zip(raw, taps.levels, strict=True)):
        side = 32 >> (len(widths) - 1 - level)
        assert [tuple(x.shape) for x in tensors] == [(4, tap.channels, side, side) for tap in promised]
        # Image b's features: row b (unconditional), then row 2 + b (conditional), tap by tap.
        first = tensors[0]
        assert torch.equal(features[level][1, : 2 * first.shape[1]], torch.cat([first[1], first[3]]))
    assert not any(module._forward_hooks for module in unet.modules())
    config = HeadConfig.for_unet(unet.config, embed_dim=16, ffn_dim=16)
    assert config.channels == tuple(feature.shape[1] for feature in features)
    logits = GroundingHead(config)(features, torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
    assert logits.shape == (2, 3, 32, 32)
    assert logits.isfinite().all()


def test_taps_refuse_an_unknown_block():
    with pytest.raises(CheckpointError, match="AttnDownBlock2D"):
        level_taps(dict(SD15, down_block_types=("AttnDownBlock2D",) * 4))


def test_state_dict_is_the_released_one():
    with torch.device("meta"):
        head = GroundingHead(HeadConfig.for_unet(SD15))
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    assert len(shapes) == 90
    assert sum(p.numel() for p in head.parameters()) == 18_796_560
    for name, shape in dict(low=(16, 15360), mid=(32, 14080), high=(64, 8320), highest=(128, 5120)).items():
        assert shapes.pop(f"{name}_feature_conv.0.weight") == (*shape, 1, 1)
    for name, c in dict(mid=48, high=112, highest=240).items():
        for key in ("stored_mean1", "stored_var1", "stored_mean2", "stored_var2"):
            assert shapes.pop(f"{name}_feature_mix_conv.{key}") == (c,)
        for conv in ("conv1", "conv2"):
            for key, shape in dict(weight=(c, c, 3, 3), bias=(c,), u0=(1, c), sv0=(1,)).items():
                assert shapes.pop(f"{name}_feature_mix_conv.{conv}.{key}") == shape
    decoder = {}
    for i in range(3):
        prefix = f"transfromer_decoder.layers.{i}."
        for attention in ("self_attn", "multihead_attn"):
            decoder[f"{prefix}{attention}.in_proj_weight"] = (1536, 512)
            decoder[f"{prefix}{attention}.out_proj.weight"] = (512, 512)
        decoder |= {f"{prefix}norm{n}.{kind}": (512,) for n in (1, 2, 3) for kind in ("weight", "bias")}
        decoder |= {f"{prefix}linear1.weight": (2048, 512), f"{prefix}linear1.bias": (2048,)}
        decoder |= {f"{prefix}linear2.weight": (512, 2048), f"{prefix}linear2.bias": (512,)}
    mlp = {f"mlp.layers.{i}.{k}": s for i in (0, 1) for k, s in dict(weight=(512, 512), bias=(512,)).items()}
    mlp |= {"mlp.layers.2.weight": (240, 512), "mlp.layers.2.bias": (240,)}
    assert shapes == decoder | mlp | {"to_k.weight": (512, 3840), "to_q.weight": (512, 768)}


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_head_computes_the_released_forward_image_by_image(variant):
    config = small_config(variant=variant, image_scale=8)
    head, (raw, arranged, queries, valid) = randomised(config), random_inputs(config)
    with torch.no_grad():
        logits = upsample_logits(head(arranged, queries, valid), (128, 128))
        folded = upsample_logits(fold(head)(raw, queries, valid), (128, 128))
    state = head.state_dict()
    for b in range(2):
        features = [level[b : b + 1] for level in arranged]
        expected = released_forward(state, features, queries[b], 128, 4, 8, upsampled=variant == "paper")
        assert relative_l2(logits[b], expected) < 1e-5
        assert relative_l2(folded[b], expected) < 1e-5


@pytest.mark.parametrize(("variant", "patch", "scale"), [("released", 1, 8), ("released", 3, 8), ("paper", 2, 2)])
def test_folding_keeps_the_tokens_of_any_patch(variant, patch, scale):
    """A patch of one cell has no neighbours to look at, nor has one of three; the paper's always has."""
    config = HeadConfig(
        tap_channels=((8,), (4,)), variant=variant, embed_dim=32, heads=4, ffn_dim=64, patch=patch, text_dim=16,
        image_scale=scale,
    )  # fmt: skip
    head, (raw, arranged, queries, valid) = randomised(config), random_inputs(config, low=6)
    with torch.no_grad():
        assert relative_l2(fold(head)(raw, queries, valid), head(arranged, queries, valid)) < 1e-5


@pytest.mark.parametrize("detail", [2, 4])
def test_detail_draws_what_is_thinner_than_a_cell(detail):
    """Stripes of one fine cell: a grid of whole cells can do no better than to say half everywhere."""
    losses = {}
    for scale in (1, detail):
        config = HeadConfig(
            tap_channels=((8,), (4,)), embed_dim=32, heads=4, ffn_dim=64, patch=2, text_dim=16, detail=scale
        )
        head, (raw, arranged, queries, valid) = randomised(config).train(), random_inputs(config, low=4)
        target = (torch.arange(8 * detail) % 2).float().expand(2, 3, 8 * detail, 8 * detail)
        optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
        for _ in range(40):
            logits = head(arranged, queries, valid)
            assert logits.shape == (2, 3, 8 * scale, 8 * scale)
            loss = F.binary_cross_entropy_with_logits(upsample_logits(logits, target.shape[2:]), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses[scale] = loss.item()
        head.eval()
        with torch.no_grad():
            assert relative_l2(fold(head)(raw, queries, valid), head(arranged, queries, valid)) < 1e-5
    assert losses[1] > 0.68
    assert losses[detail] < 0.2


@pytest.mark.parametrize("statistics", ["per_image", "stored"])
def test_folded_head_equals_the_plain_one(statistics):
    """Identities 1 and 3 alone, against the module with the same statistics."""
    config = small_config(statistics=statistics)
    head, (raw, arranged, queries, valid) = randomised(config), random_inputs(config, batch=3)
    with torch.no_grad():
        assert relative_l2(fold(head)(raw, queries, valid), head(arranged, queries, valid)) < 1e-5


def test_statistics_matter():
    config = small_config()
    head, (_, arranged, queries, valid) = randomised(config), random_inputs(config)
    stored = GroundingHead(dataclasses.replace(config, statistics="stored")).eval()
    stored.load_state_dict(head.state_dict())
    with torch.no_grad():
        assert relative_l2(stored(arranged, queries, valid), head(arranged, queries, valid)) > 0.05


def test_padded_queries_influence_nothing():
    config = small_config()
    head, (_, arranged, queries, valid) = randomised(config), random_inputs(config, objects=2)
    padded = torch.cat([queries, torch.full((2, 6, config.text_dim), float("nan"))], 1)
    mask = torch.arange(8)[None].expand(2, 8) < 2
    with torch.no_grad():
        plain, with_padding = head(arranged, queries, valid), head(arranged, padded, mask)
        nothing = head(arranged, padded, torch.zeros_like(mask))
    assert torch.allclose(with_padding[:, :2], plain, atol=1e-5, rtol=1e-5)
    assert with_padding.isfinite().all()
    assert nothing.isfinite().all()


def test_training_moves_spectral_norm_and_statistics_and_learns():
    config = HeadConfig(tap_channels=((8,), (8, 4), (4,)), embed_dim=32, heads=4, ffn_dim=64, patch=2, text_dim=16)
    head, (_, arranged, queries, valid) = randomised(config).train(), random_inputs(config, batch=4, low=4)
    target = (arranged[-1][:, :3] > 0).float()
    before = {key: value.clone() for key, value in head.state_dict().items()}
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(head(arranged, queries, valid), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    still = [key for key, value in head.state_dict().items() if torch.equal(value, before[key])]
    assert not still
    assert losses[-1] < 0.5 * losses[0]
    weight = head.highest_feature_mix_conv.conv1
    largest = torch.linalg.matrix_norm(weight.weight.flatten(1), 2).item()
    assert abs(weight.sv0.item() / largest - 1) < 0.05


def test_released_file_round_trip_and_missing_keys(tmp_path):
    config = small_config()
    head, (_, arranged, queries, valid) = randomised(config), random_inputs(config)
    state = head.state_dict()
    torch.save(state, tmp_path / "grounding_module.pth")
    loaded = load_released(tmp_path / "grounding_module.pth", config)
    assert torch.equal(loaded(arranged, queries, valid), head(arranged, queries, valid).detach())
    state["extra"] = state.pop("to_q.weight")
    state["mlp.layers.2.bias"] = torch.zeros(3)
    del state["to_k.weight"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError) as error:
        load_released(tmp_path / "broken.pth", config)
    message = str(error.value)
    assert "2 missing keys: to_k.weight, to_q.weight" in message
    assert "unknown keys: extra" in message
    assert re.search(r"mlp\.layers\.2\.bias is \(3,\) instead of \(36,\)", message)


def test_a_checkpoint_of_another_kind_says_how_many_keys(tmp_path):
    """And names a few: a whole UNet's would fill pages."""
    config = HeadConfig.for_unet(SMALL)
    torch.save({f"unet.{k}.weight": torch.zeros(1) for k in range(700)}, tmp_path / "unet.pth")
    with pytest.raises(CheckpointError) as error:
        load_released(tmp_path / "unet.pth", config)
    message = str(error.value)
    assert "700 unknown keys: unet.0.weight, unet.1.weight" in message
    assert "and 695 more" in message
    assert len(message) < 700


class Payload:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, legacy):
    trace, file = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"to_q.weight": Payload(f"touch {trace}")}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="code, which is never run"):
        load_released(file, small_config())
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 broken zip", None])
def test_a_file_that_is_no_checkpoint_gives_one_line(tmp_path, content):
    file = tmp_path / "head.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load_released(file, small_config())
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_configuration_is_checked():
    with pytest.raises(UsageError, match="unknown head option widths"):
        HeadConfig.for_unet(SD15, widths=3)
    with pytest.raises(UsageError, match="choose released or paper"):
        HeadConfig.for_unet(SD15, variant="both")
    with pytest.raises(UsageError, match="not divisible by 7 heads"):
        HeadConfig.for_unet(SD15, heads=7)
    with pytest.raises(UsageError, match="reduced_channels"):
        HeadConfig.for_unet(SD15, reduced_channels=[8, 16])
