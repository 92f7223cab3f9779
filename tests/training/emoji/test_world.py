"""The emoji world: exact masks, honest captions, the same scene for the same seed."""

import pytest
import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.emoji.oracle import class_iou, class_map
from grounded_diffusion.training.emoji.world import NAMES, SEEN, UNSEEN, World, WorldConfig, glyph_bank
from grounded_diffusion.training.loop import step_generator


def test_the_same_seed_draws_the_same_scene():
    world = World(WorldConfig(size=32))
    first, again, other = (world.render(4, step_generator(0, step)) for step in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert first.captions == again.captions
    assert not torch.equal(first.images, other.images)


def test_captions_name_the_objects_that_are_drawn():
    world = World(WorldConfig(size=32, pair_share=0.5))
    scene = world.render(64, step_generator(1, 0))
    for caption, (first, second), labels in zip(scene.captions, scene.objects.tolist(), scene.labels, strict=True):
        assert f"a {world.names[first]}" in caption
        assert (second >= 0) == (2 in labels.unique().tolist())
        assert second < 0 or f"a {world.names[second]}" in caption
        assert 1 in labels.unique().tolist()
    assert 0 < (scene.objects[:, 1] >= 0).sum() < 64


def test_masks_are_where_the_glyphs_are():
    """Without its glyphs a scene is its background: only masked pixels, and a thin edge, may differ."""
    world = World(WorldConfig(size=64, pair_share=0.0))
    drawn = world.render(8, step_generator(2, 0), captions=False)
    world.bank = torch.zeros_like(world.bank)
    bare = world.render(8, step_generator(2, 0), captions=False)
    changed = (drawn.images - bare.images).abs().amax(1) > 0.5
    grown = torch.nn.functional.max_pool2d((drawn.labels > 0).float()[:, None], 5, 1, 2)[:, 0] > 0
    assert changed.any()
    assert not (changed & ~grown).any()


def test_class_maps_and_their_iou():
    world = World(WorldConfig(size=32), names=["dog", "cat", "bus"])
    scene = world.render(16, step_generator(3, 0))
    classes = class_map(scene)
    for b, row in enumerate(scene.objects.tolist()):
        for k, name in enumerate(row):
            if name >= 0:
                assert torch.equal(classes[b] == name + 1, scene.labels[b] == k + 1)
    assert class_iou(classes, classes, 4)[classes.unique()].eq(1).all()
    truth, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert class_iou(predicted, truth, 2).tolist() == pytest.approx([1 / 2, 2 / 3])


def test_every_name_has_a_glyph_and_a_side():
    bank = glyph_bank(list(NAMES), 32)
    assert bank.shape == (len(NAMES), 4, 32, 32)
    assert (bank[:, 3].mean(dim=(1, 2)) > 0.1).all()
    assert set(SEEN) | set(UNSEEN) == set(NAMES)
    assert not set(SEEN) & set(UNSEEN)


def test_bad_options_are_refused():
    with pytest.raises(UsageError, match=r"world\.size is 30"):
        WorldConfig(size=30)
    with pytest.raises(UsageError, match=r"world\.pair"):
        WorldConfig(pair=(0.6, 0.5))
    with pytest.raises(UsageError, match="no glyph is known for 'zebra'"):
        glyph_bank(["zebra"], 32)
