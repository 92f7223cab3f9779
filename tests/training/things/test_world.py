"""The things world: exact masks, honest captions, the same scene for the same seed, models kept from training."""

import pytest
import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.loop import step_generator
from grounded_diffusion.training.scratch.segmenters import class_map
from grounded_diffusion.training.things.bank import load_sprites
from grounded_diffusion.training.things.world import SURFACES, World, WorldConfig

FEW = ["dog", "car", "boat", "aeroplane"]


def test_the_same_seed_draws_the_same_scene():
    world = World(WorldConfig(size=32), FEW)
    first, again, other = (world.render(8, step_generator(0, step)) for step in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert first.captions == again.captions
    assert not torch.equal(first.images, other.images)


def test_captions_name_the_objects_that_are_drawn():
    world = World(WorldConfig(size=32, pair_share=0.5), FEW)
    scene = world.render(64, step_generator(1, 0))
    for caption, (first, second), labels in zip(scene.captions, scene.objects.tolist(), scene.labels, strict=True):
        assert f"a {world.names[first]}" in caption
        assert 1 in labels.unique().tolist()
        assert (second >= 0) == (2 in labels.unique().tolist())
        assert second < 0 or f"a {world.names[second]}" in caption
    assert 0 < (scene.objects[:, 1] >= 0).sum() < 64


def darkening(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the background's light [8,64,64] that black sprites of a name and their shadows take, and the labels."""
    world = World(WorldConfig(size=64, pair_share=0.0), [name])
    world.bank[:, :3] = 0
    drawn = world.render(8, step_generator(2, 0), captions=False)
    world.bank[:] = 0
    bare = world.render(8, step_generator(2, 0), captions=False)
    light = torch.where(bare.images < 0.99, bare.images + 1, 0)  # a channel that is clipped tells nothing
    brightest = light.argmax(1, keepdim=True)
    kept = (drawn.images + 1).gather(1, brightest) / light.gather(1, brightest)
    return torch.where(light.amax(1) > 0.2, 1 - kept[:, 0], torch.nan), drawn.labels


def test_a_mask_is_where_more_than_half_of_the_light_is_covered():
    """In the sky there is no shadow, so that what is dark is the sprite."""
    dark, labels = darkening("aeroplane")
    certain = (dark - 0.5).abs() > 1e-3
    assert certain.float().mean() > 0.8
    assert torch.equal((dark > 0.5)[certain], (labels == 1)[certain])


def test_a_shadow_is_no_part_of_the_mask():
    dark, labels = darkening("dog")
    assert dark[labels == 1].nan_to_num(1).min() > 0.5 - 1e-3
    assert ((dark > 0.1) & (labels == 0)).sum() > 8 * 40


def test_whales_are_in_the_water_and_dogs_are_not():
    world = World(WorldConfig(size=32, pair_share=0.0), ["whale", "dog", "aeroplane"])
    allowed = {name: {SURFACES[i] for i in world.allowed[n].nonzero()[:, 0]} for n, name in enumerate(world.names)}
    assert allowed["whale"] == {"water"}
    assert allowed["aeroplane"] == {"sky"}
    assert allowed["dog"] == set(SURFACES) - {"water", "sky"}
    scene = world.render(200, step_generator(3, 0))
    for caption, (first, _) in zip(scene.captions, scene.objects.tolist(), strict=True):
        if " on the " in caption:
            assert caption.rpartition(" on the ")[2] in allowed[world.names[first]]


def test_feet_are_on_the_ground_and_inside_the_image():
    world = World(WorldConfig(size=64, pair_share=0.0), ["dog", "car", "sofa"])
    labels = world.render(64, step_generator(4, 0), captions=False).labels > 0
    lowest = 64 - labels.any(2).flip(1).float().argmax(1)
    assert lowest.min() >= 64 * 0.75
    assert not labels[:, -1].any()


def test_held_out_models_are_not_those_of_training():
    train = load_sprites(["car"], 32, models=0, views=0)
    test = load_sprites(["car"], 32, models=0, views=0, held_out=True)
    assert len(train.pictures) == 7 * 4
    assert len(test.pictures) == 2 * 4
    assert not any(torch.equal(a, b) for a in train.pictures for b in test.pictures)
    alone = load_sprites(["zebra"], 32, models=0, views=0, held_out=True)
    assert torch.equal(alone.pictures, load_sprites(["zebra"], 32, models=0, views=0).pictures)


def test_a_run_may_take_the_first_models_and_views_only():
    sprites = load_sprites(["car", "dog"], 32, models=1, views=2)
    assert sprites.count.tolist() == [2, 2]
    assert sprites.first.tolist() == [0, 2]
    assert torch.equal(sprites.pictures[:2], load_sprites(["car"], 32, models=0, views=0).pictures[:2])


def test_class_maps_follow_the_names():
    world = World(WorldConfig(size=32, pair_share=0.5), FEW)
    scene = world.render(16, step_generator(5, 0))
    for classes, labels, row in zip(class_map(scene), scene.labels, scene.objects.tolist(), strict=True):
        for k, name in enumerate(row):
            assert name < 0 or torch.equal(classes == name + 1, labels == k + 1)


def test_bad_options_are_refused():
    for options, message in {
        ("size", 30): r"world\.size is 30",
        ("pair", (0.6, 0.5)): r"world\.pair",
        ("flip", 2.0): "shares",
        ("views", -1): "counts",
    }.items():
        with pytest.raises(UsageError, match=message):
            WorldConfig(**dict([options]))
    with pytest.raises(UsageError, match="no sprite is known for unicorn"):
        World(WorldConfig(size=32), ["unicorn"])
