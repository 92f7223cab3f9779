"""Peers whose parts are exported by torch.onnx.export at the very size, see `peers`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grounded_diffusion.bench.peers import CompiledPeer, Part, Peer
from grounded_diffusion.engine import Options
from grounded_diffusion.engine.backends.openvino_cpu import load_openvino
from grounded_diffusion.errors import BackendError
from grounded_diffusion.export.graphs import quiet
from grounded_diffusion.training.checkpoint import Checkpoint


class OnnxPeer(Peer):
    """The three parts exported to ONNX and run by ONNX Runtime's default session; the text encoder stays in torch.

    Args:
        folder: where the exported graphs are kept; those that are there are used.
        objects, size: O and (h, w) that they are exported for.
        threads: of the sessions; 0 is ONNX Runtime's own choice, all cores.

    Raises:
        BackendError: ONNX Runtime has no provider for the device.
    """

    kind = "onnxruntime"

    def __init__(self, *args, folder: Path, objects: int, size: tuple[int, int], threads: int = 0, **kwargs):
        self.folder, self.objects, self.size, self.threads = folder, objects, size, threads
        super().__init__(*args, **kwargs)

    def prepare(self, plain, grounded, decode):
        batch, (height, width), text = self.form.batch, self.size, self.checkpoint.text_encoder.config
        channels = self.checkpoint.unet.config.in_channels
        tensor = lambda *shape: torch.randn(shape, device=self.device, dtype=self.dtype)
        unet = dict(
            latents=tensor(2 * batch, channels, height, width),
            timestep=torch.ones(2 * batch, device=self.device),
            context=tensor(2 * batch, text.max_position_embeddings, text.hidden_size),
        )
        queries = dict(
            queries=tensor(batch, self.objects, text.hidden_size).float(),
            query_valid=torch.ones(batch, self.objects, dtype=torch.bool, device=self.device),
        )
        latents = dict(latents=tensor(batch, channels, height, width))
        given = dict(plain=(plain, unet), grounded=(grounded, unet | queries), decode=(decode, latents))
        return tuple(self._session(name, module, inputs) for name, (module, inputs) in given.items())

    def _session(self, name: str, module: nn.Module, inputs: dict[str, torch.Tensor]) -> Part:
        """A module's ONNX session as a function of tensors."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        providers = ["CUDAExecutionProvider"] if self.device == "cuda" else ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(self._export(name, module, inputs), options, providers=providers)
        if session.get_providers()[0] != providers[0]:  # it falls back by itself
            raise BackendError(f"this onnxruntime cannot open {providers[0]}")
        names = [value.name for value in session.get_inputs()]

        def run(*tensors: torch.Tensor) -> Any:
            given = {n: t.contiguous().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
            outputs = [torch.from_numpy(array).to(self.device) for array in session.run(None, given)]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        return run

    def _export(self, name: str, module: nn.Module, inputs: dict[str, torch.Tensor]) -> Path:
        """The module as an ONNX file of this very batch and size."""
        path = self.folder / f"{name}-{self.form.batch}.onnx"
        if not path.is_file():
            with torch.no_grad(), quiet():
                torch.onnx.export(module.eval(), kwargs=inputs, dynamo=True, verbose=False).save(path)
        return path


class OpenVinoPeer(OnnxPeer):
    """The same exports run by OpenVINO with its throughput hint: as many batches at once as it asks for.

    "bf16" is its own choice on a chip that has it, "fp32" is asked for. The graphs themselves are of FP32.
    """

    kind = "openvino"

    def __init__(self, checkpoint: Checkpoint, options: Options, capture: int, precision: str, *args, **more):
        self.hint = {} if precision == "bf16" else {"INFERENCE_PRECISION_HINT": "f32"}
        super().__init__(checkpoint, options, capture, "fp32", *args, **more)
        self.name = f"{self.kind} {precision}"

    def _session(self, name: str, module: nn.Module, inputs: dict[str, torch.Tensor]) -> Part:
        """A module's compiled model as a function of tensors, for several threads."""
        openvino = load_openvino()
        settings = {"PERFORMANCE_HINT": "THROUGHPUT"} | self.hint
        settings |= {"INFERENCE_NUM_THREADS": self.threads} if self.threads else {}
        model = openvino.Core().compile_model(self._export(name, module, inputs), "CPU", settings)
        self.lanes = max(self.lanes, model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        own = threading.local()

        def run(*tensors: torch.Tensor) -> Any:
            if not hasattr(own, "request"):
                own.request = model.create_infer_request()
            own.given = [tensor.contiguous().numpy() for tensor in tensors]  # kept: OpenVINO reads it where it lies
            for i, array in enumerate(own.given):
                own.request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
            own.request.start_async()
            own.request.wait()
            outputs = [
                torch.from_numpy(own.request.get_output_tensor(i).data.copy()) for i in range(len(model.outputs))
            ]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        return run


KINDS = {kind.kind: kind for kind in (Peer, CompiledPeer, OnnxPeer, OpenVinoPeer)}
