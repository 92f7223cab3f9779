"""The bundle: a directory that holds one exported model, and the only thing export and engine share.

`manifest.json` is written last, so a directory without it is not a bundle. Every file it lists is
checked by SHA-256 when the bundle is opened.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from grounded_diffusion.errors import BundleError
from grounded_diffusion.files import replace_file
from grounded_diffusion.reading import Count, Misfit, Number, as_type, load_json, read_file

SCHEMA = 1
MANIFEST = "manifest.json"
SHIPPED = "things-64"  # the model that comes with the package, a folder of models/
EXPORTER = "grounded_diffusion.export"  # makes bundles: `python -m`, in a process of its own, since it needs torch

TEXT_ENCODER = "text_encoder.onnx"
UNET = "unet.onnx"
UNET_GROUNDED = "unet_grounded.onnx"
VAE_DECODER = "vae_decoder.onnx"
TOKENIZER = "tokenizer.json"
GRAPHS = (TEXT_ENCODER, UNET, UNET_GROUNDED, VAE_DECODER)
# Prefixes of the same graphs as written for one runtime: ONNX Runtime's CPU provider; its CUDA provider, in fused
# operators of its own; a GPU in standard operators, for TensorRT and for that provider too; OpenVINO. A bundle may lack
# any of them. The names of weight files in them are relative to the bundle; OpenVINO takes weights from a graph's own
# folder only, so its graphs have no folder.
CPU, CUDA, GPU, OPENVINO = "cpu/", "cuda/", "gpu/", "openvino."
FP8 = "fp8/"  # the UNets of GPU in FP8, for TensorRT; all else that it runs is of GPU
INT8 = "openvino.int8."  # the UNets of OPENVINO in 8 bits, as OpenVINO writes a model: .xml with .bin beside it
# What all their UNets need of the context, which is the same from step to step: context [N,L,D] -> keys and values of
# every cross-attention. They are inputs of those graphs in the place of the context. The first axis of latents and
# timestep is called S in those graphs: N rows, or the B that both halves of guidance have in common.
CONTEXT = "context.onnx"
# What OPENVINO's need of the timestep, in its place: timestep [1] -> what each residual block adds, [1,C,1,1].
TIME = "time.onnx"
MAKERS = {"context": CONTEXT, "timestep": TIME}  # graphs by the input that they take
SHARED_ROWS = "S"

# Names and shapes of every graph's inputs and outputs. B images, N = 2B guided rows
# [unconditional x B; conditional x B], O objects, T tokens, L rows of a context, which are T or more (context_rows), D
# text width. input_ids are int64, query_valid is bool,
# everything else is floating point: float32, or float16 in a bundle of that precision, where timestep and mask_logits
# stay float32. B, N, O, h and w are free; the plain UNet takes any N.
GRAPH_IO: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    TEXT_ENCODER: ({"input_ids": "B,T"}, {"context": "B,L,D"}),
    UNET: ({"latents": "N,4,h,w", "timestep": "N", "context": "N,L,D"}, {"model_output": "N,4,h,w"}),
    UNET_GROUNDED: (
        {
            "latents": "N,4,h,w",
            "timestep": "N",
            "context": "N,L,D",
            "queries": "B,O,D",
            "query_valid": "B,O",
        },
        {"model_output": "N,4,h,w", "mask_logits": "B,O,h',w'"},
    ),
    VAE_DECODER: ({"latents": "B,4,h,w"}, {"image": "B,3,H,W"}),
}
GPU_GRAPHS = (TEXT_ENCODER, CONTEXT, UNET, UNET_GROUNDED, VAE_DECODER)  # what runs on a GPU, see Bundle.gpu_io
# Outputs that a graph may have besides, float32 in either precision: whether each object is there, as a logit.
PRESENCE, TELLS_PRESENCE = "presence", "presence_layers"
OPTIONAL_OUTPUTS: dict[str, dict[str, str]] = {UNET_GROUNDED: {PRESENCE: "B,O"}}
IN_FLOAT = ("timestep", "mask_logits", PRESENCE)  # inputs and outputs that are float32 in an FP16 bundle too


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an exported model is. Everything the runtime needs to know besides the graphs.

    Attributes:
        family: architecture family, "stable-diffusion".
        image_size: (H, W) the model was trained at, in pixels.
        vae_scale_factor: pixels per latent cell.
        latent_channels: channels of the latent, 4 for Stable Diffusion.
        size_multiple: H and W must be multiples of this.
        context_length: tokens per prompt, 77 for CLIP; see also context_rows.
        context_dim: width of the text embedding (D).
        pad_token_id, bos_token_id, eos_token_id: the tokenizer's special ids.
        scheduler: the diffusers `scheduler_config.json` of the checkpoint, as it stands.
        guidance_layout: "uncond_first": row b is unconditional and row B+b conditional of image b.
        capture_timestep: training timestep at which the grounding head reads features.
        query_template: text whose sub-tokens at "{}" make an object's query.
        head: variant ("released" or "paper"), statistics ("per_image" or "stored") and sizes; and TELLS_PRESENCE,
            the layers that it is read at, where the grounded graph also says whether an object is there.
        precision: floating-point type of the graphs' weights, "fp32" or "fp16".
        keys_values: shapes of what CONTEXT makes of a context, by name, as GRAPH_IO has shapes.
        memory: of the graphs that a GPU runs, by file: bytes of their weights, and of all that one image of image_size
            needs at once while they run, both halves of guidance where there are two.
        names: object names the model was trained to draw, and those its head was trained on.
        pooled_text: the context has, after the rows of its tokens, one with the text as a whole, as SDXL wants it.
        guidance_embedding: width of the embedding of the guidance scale that the UNet wants as the context's last row;
            0 for a UNet that does not. Such a model (LCM) is guided by that alone.
        sampling: the model's own "sampler", "steps", "guidance_scale" and "guidance_interval", for runs that do not say
            theirs; those that it lacks are the engine's.
        base: digest of the base model's weights, by which examples for a head are told to be of this model.
        files: SHA-256 of every other file of the bundle, by name.
        versions: of everything that made the bundle.
        schema: version of this format.
    """

    family: str
    image_size: tuple[Count, Count]
    vae_scale_factor: Count
    latent_channels: Count
    size_multiple: Count
    context_length: Count
    context_dim: Count
    pad_token_id: Number
    bos_token_id: Number
    eos_token_id: Number
    scheduler: dict[str, Any]
    capture_timestep: Number
    query_template: str
    head: dict[str, Any]
    precision: str
    guidance_layout: str = "uncond_first"
    keys_values: dict[str, str] = field(default_factory=dict)
    memory: dict[str, tuple[Number, Number]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    pooled_text: bool = False
    guidance_embedding: Number = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def context_rows(self) -> int:
        """Rows (L) of a context as the UNets take it: of the tokens, and what else the model is told."""
        return self.context_length + self.pooled_text + (self.guidance_embedding > 0)


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def tells_presence(self) -> bool:
        """Whether the grounded graph has the output PRESENCE."""
        return TELLS_PRESENCE in self.manifest.head

    def outputs(self, graph: str) -> dict[str, str]:
        """Shapes of a graph's outputs, those among them that not every bundle has."""
        return GRAPH_IO[graph][1] | (OPTIONAL_OUTPUTS.get(graph, {}) if self.tells_presence else {})

    def gpu_io(self, graph: str) -> tuple[dict[str, str], dict[str, str]]:
        """Inputs and outputs of one of GPU_GRAPHS as it runs there: keys and values in the place of the context."""
        made = self.manifest.keys_values
        if graph == CONTEXT:
            return {"context": "N,L,D"}, made
        inputs = GRAPH_IO[graph][0]
        if "context" not in inputs:
            return inputs, self.outputs(graph)
        same = {"latents": f"{SHARED_ROWS},4,h,w", "timestep": SHARED_ROWS}
        others = {name: shape for name, shape in inputs.items() if name not in ("context", *same)}
        return same | others | made, self.outputs(graph)

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.path / name

    def variant(self, prefix: str, graph: str) -> Path:
        """Path of a graph as written for a runtime, CPU, CUDA or OPENVINO; else of the standard one."""
        names = [f"{prefix}{graph}", *([f"{GPU}{graph}"] if prefix == FP8 else [])]
        return self.file(next((name for name in names if name in self.manifest.files), graph))

    def int8(self, graph: str) -> Path | None:
        """Path of a UNet in 8 bits; None where the bundle has none, or for another graph."""
        name = f"{INT8}{Path(graph).stem}.xml"
        return self.file(name) if name in self.manifest.files else None


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a manifest's `sampling` may have; the values here are not looked at."""

    sampler: str = ""
    steps: Count = 1
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)


class HasSchema(msgspec.Struct):
    """What a file of any version has."""

    schema: int


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole; the last step of making a bundle."""
    replace_file(path / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True).encode())


def read_manifest(path: Path) -> Manifest:
    """Parse a bundle's manifest. Raises BundleError when it is absent, damaged or of another schema."""
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"there is no bundle at {path}; make one with gd-export --ckpt CHECKPOINT --out {path}")
    if not file.is_file():
        raise BundleError(f"{path} has no {MANIFEST}, so its export did not finish; run gd-export again")
    try:
        content = read_file(file)
        raw = load_json(content)
        schema = as_type(raw, HasSchema, content).schema
        if schema != SCHEMA:
            repair = "upgrade grounded-diffusion" if schema > SCHEMA else "run gd-export again"
            raise BundleError(f"{file} has schema {schema}, this version reads schema {SCHEMA}; {repair}")
        return checked(as_type(raw, Manifest, content))
    except Misfit as error:
        raise BundleError(f"{error.at(file)}; run gd-export again") from None


def checked(manifest: Manifest) -> Manifest:
    """A manifest whose fields make sense together. Raises Misfit."""
    if manifest.query_template.count("{}") != 1:
        raise Misfit(f"query_template must have {{}} once, not be {manifest.query_template!r}")
    if manifest.precision not in ("fp32", "fp16"):
        raise Misfit(f"precision must be fp32 or fp16, not {manifest.precision!r}")
    if manifest.guidance_layout != "uncond_first":
        raise Misfit(f"guidance_layout must be uncond_first, not {manifest.guidance_layout!r}")
    if manifest.size_multiple % manifest.vae_scale_factor:
        raise Misfit(f"size_multiple must be a multiple of vae_scale_factor {manifest.vae_scale_factor}")
    if not all(side % manifest.size_multiple == 0 for side in manifest.image_size):
        raise Misfit(f"image_size must be multiples of size_multiple {manifest.size_multiple}")
    try:
        as_type(manifest.sampling, Sampling)
    except Misfit as error:
        raise Misfit(f"sampling: {error}") from None
    if manifest.context_length < 3:
        raise Misfit("context_length must be at least 3: begin, a word and end")
    return manifest


def open_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Open a bundle and check every file it lists.

    Args:
        path: the bundle's directory.
        verify: compare SHA-256 of every file; presence is always checked.

    Raises:
        BundleError: not a bundle, another schema, a missing or a changed file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for name in (*GRAPHS, TOKENIZER):
        if name not in manifest.files:
            raise BundleError(f"{path / MANIFEST} does not list {name}; run gd-export again")
    for name, digest in manifest.files.items():
        if not (path / name).is_file():
            raise BundleError(f"{path / name} is missing; run gd-export again")
        if verify and sha256(path / name) != digest:
            raise BundleError(f"{path / name} has changed since export (SHA-256 differs); run gd-export again")
    return Bundle(path, manifest)
