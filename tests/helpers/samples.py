"""Samples made by hand, for tests of what comes after the model."""

import numpy as np

from grounded_diffusion.engine.dataset.instances import mask_box
from grounded_diffusion.engine.sampling.sample import ObjectMask, Sample


def object_masks(masks, score=0.75):
    """Objects of given masks, by name, labelled in their order."""
    return tuple(
        ObjectMask(name, k, int(mask.sum()), tuple(mask_box(mask)), score, lambda mask=mask: mask)
        for k, (name, mask) in enumerate(masks.items(), 1)
    )


def label_map(masks):
    """The label map of masks, in which the last one lies on top."""
    labels = np.zeros(next(iter(masks.values())).shape, np.uint8)
    for k, mask in enumerate(masks.values(), 1):
        labels[mask] = k
    return labels


def sample(index, image, masks, prompt="a", score=0.75, **changes):
    """A sample of an image and its masks; `changes` are fields of Sample."""
    given = dict(
        index=index, prompt=prompt, objects=object_masks(masks, score), seed=7, draw=index, image=image,
        labels=label_map(masks), capture_timestep=1.0, mask_logits=np.zeros((len(masks), 5, 7), np.float32),
        latents=np.zeros((4, 5, 7), np.float32), captured_latents=np.zeros((4, 5, 7), np.float32),
    )  # fmt: skip
    return Sample(**(given | changes))
