"""How much memory a bucket of sizes needs on a GPU, before anything is opened: counted bytes, not measured ones."""

from __future__ import annotations

from grounded_diffusion.bundle import CONTEXT, TEXT_ENCODER, UNET, UNET_GROUNDED, VAE_DECODER, Bundle
from grounded_diffusion.engine.backends.gpu.memory import Sizes, loop_bytes


def sizes_of(bundle: Bundle, batch: int, objects: int, image: tuple[int, int]) -> Sizes:
    """The sizes of a bucket for a bundle's images of (H, W)."""
    manifest = bundle.manifest
    height, width = (side // manifest.vae_scale_factor for side in image)
    latent = (manifest.latent_channels, height, width)
    return Sizes(batch, objects, latent, manifest.context_rows, manifest.context_dim, image)


def counted_memory(bundle: Bundle, prefix: str, s: Sizes) -> int | None:
    """Bytes that sessions of one graph each need, with weights and an arena of their own, as ONNX Runtime has them.

    Activations are those that export has counted, for more images and larger ones in proportion. The UNet has a second
    session, for steps without guidance. None: the bundle does not say.

    Args:
        prefix: of the graphs' variant.
    """
    counted, manifest = bundle.manifest.memory, bundle.manifest
    height, width = manifest.image_size
    area = s.image[0] * s.image[1] / (height * width)
    images = {
        TEXT_ENCODER: 0.0,  # small
        CONTEXT: 2.0 * s.batch,
        UNET_GROUNDED: s.batch * area,
        UNET: s.batch * area * 1.5,
        VAE_DECODER: s.decoded * area,
    }
    total = loop_bytes(bundle, s)
    for graph, count in images.items():
        file = bundle.variant(prefix, graph).relative_to(bundle.path).as_posix()
        if file not in counted:
            return None
        weights, activations = counted[file]
        total += (2 if graph == UNET else 1) * int(weights) + round(count * activations)
    return total
