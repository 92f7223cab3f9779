"""Tracing a tiny UNet takes half a minute, its decoder and text encoder a third of that, and many tests export them."""

import contextlib
import copy
import gc
import hashlib
from collections.abc import Mapping
from dataclasses import is_dataclass

LARGEST = 1 << 22  # weights of a module whose trace is kept
SILENT = {"sample_size", "tile_sample_min_size", "tile_latent_min_size",  # of an autoencoder in tiles, as none is here
          "_name_or_path", "_use_default_values", "_class_name", "_diffusers_version"}  # fmt: skip


@contextlib.contextmanager
def traced_once():
    """Modules that are equal in form and weights are traced once; every export gets a copy of its own."""
    from grounded_diffusion.export import graphs

    known, capture = {}, graphs.capture

    def captured(checkpoint, graph, module):
        if sum(weight.numel() for weight in module.parameters()) > LARGEST:
            return capture(checkpoint, graph, module)
        key = digest(checkpoint, graph, module)
        if key not in known:
            known[key] = capture(checkpoint, graph, module)
            gc.collect()
            gc.freeze()  # or every later collection goes through all that torch remembers of the trace
        return copied(known[key])

    graphs.capture = captured
    try:
        yield known
    finally:
        graphs.capture = capture


def copied(model):
    """A copy that may be changed: a clone's values share their types and shapes with the original's."""
    twin = model.clone()
    values = (*twin.graph.inputs, *twin.graph.initializers.values(), *(v for node in twin.graph for v in node.outputs))
    for value in values:
        value.type, value.shape = copy.copy(value.type), value.shape and value.shape.copy()
    return twin


def digest(checkpoint, graph, module):
    """What a trace hangs on: the form, settings and weights of every part, and of the head that reads them."""
    about = [graph, checkpoint.text_encoder_2 is None]
    if graph.startswith("unet"):
        about += [checkpoint.latent_size, checkpoint.head.about(), checkpoint.presence and checkpoint.presence.config]
    found = hashlib.sha256(repr(about).encode())
    for name, part in module.named_modules():
        found.update(repr((name, type(part), plain(vars(part)))).encode())
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.update(repr((name, tensor.shape, tensor.dtype)).encode())
        found.update(tensor.detach().contiguous().cpu().view(-1).numpy().tobytes())
    return found.hexdigest()


def plain(value):
    """What tells a module's attribute from another's, without places in memory."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items() if key not in SILENT}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, int | float | str | tuple | None) or is_dataclass(value):
        return repr(value)
    return type(value).__name__
