"""FP16 bundles for tests."""

import shutil
from dataclasses import replace

import onnx_ir

from grounded_diffusion.bundle import GPU, GRAPHS, TOKENIZER, UNET, UNET_GROUNDED, open_bundle, sha256, write_manifest
from grounded_diffusion.export.bundle import gpu_unet
from grounded_diffusion.export.rewrites.half import to_half
from grounded_diffusion.export.weights import WeightStore


def to_half_bundle(source, folder, change=lambda graph, model: None):
    """An FP16 bundle from the graphs of an FP32 one, each changed first: quicker than another export."""
    (folder / GPU).mkdir(parents=True)
    store, written = WeightStore(folder), []
    for graph in GRAPHS:
        model = onnx_ir.load(source / graph)
        change(graph, model)
        to_half(model, graph)
        unet = gpu_unet(model, graph) if graph in (UNET, UNET_GROUNDED) else ()
        for name, part in ((graph, model), *((f"{GPU}{file}", part) for file, part in unet)):
            store.move(part)
            onnx_ir.save(part, folder / name)
            written.append(name)
    shutil.copy(source / TOKENIZER, folder)
    files = {name: sha256(folder / name) for name in (*written, TOKENIZER, *store.files)}
    write_manifest(folder, replace(open_bundle(source).manifest, precision="fp16", files=files, memory={}))
    return folder
