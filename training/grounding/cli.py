"""gd-train examples, real, head and distill: the paper's training on anybody's model, and a student of few steps."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable

from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND
from grounded_diffusion.engine.checks import check_int
from grounded_diffusion.engine.cli.common import Parser
from grounded_diffusion.engine.cli.prompts import read_templates
from grounded_diffusion.engine.prompts.vocabulary import Vocabulary, built_in, read_names, read_pairs
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.engine.sampling.schedule import SAMPLERS
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import local_path as place
from grounded_diffusion.training.distill import cli as distill
from grounded_diffusion.training.grounding.config import LOSSES, OPTIMIZERS, PRECISIONS, PRESETS, build
from grounded_diffusion.training.grounding.loss import ZERO_MASKS
from grounded_diffusion.training.grounding.splits import Split, built_in_split, split_of

Say = Callable[[str], None]
# Settings of a head's training that are options: whole numbers, numbers, words.
WHOLE = ("iterations", "batch", "warmup", "noise_range", "seed", "validate_every", "validation", "save_every")
REAL = ("lr", "weight_decay", "muon_lr", "cooldown", "clip")
CHOICES = dict(optimizer=OPTIMIZERS, zero_masks=ZERO_MASKS, loss=LOSSES, precision=PRECISIONS)

EXAMPLES = """\
examples:
  gd-export --base sd15/ --head untrained --out base-bundle/
  gd-train examples --model base-bundle/ --detector facebook/mask2former-swin-large-coco-instance \\
      --vocabulary voc --split 1 --out examples/
  gd-train real --base sd15/ --voc VOCdevkit/VOC2012 --vocabulary voc --split 1 --out real/
  gd-train head --base sd15/ --examples examples/ --out checkpoint/
  gd-export --ckpt checkpoint/ --out bundle/

The same command given again makes what is missing.
"""


def parser_of(name: str, description: str, examples: str = EXAMPLES) -> Parser:
    shape = argparse.RawDescriptionHelpFormatter
    return Parser(
        f"gd-train {name}", description=description, epilog=examples, formatter_class=shape, allow_abbrev=False
    )


def add_names(parser: argparse.ArgumentParser) -> None:
    """Which names, and which of them are kept from the head."""
    group = parser.add_argument_group("names")
    words = group.add_mutually_exclusive_group(required=True)
    words.add_argument("--vocabulary", metavar="NAME", help="voc, coco, or things-64 (the names of the shipped model)")
    words.add_argument("--names", type=place, metavar="FILE", help="your own names, one a line")
    unseen = group.add_mutually_exclusive_group()
    unseen.add_argument(
        "--split", type=int, metavar="N", help="a split of the vocabulary (the paper's Table 4), from 1"
    )
    unseen.add_argument("--unseen", type=place, metavar="FILE", help="names that are kept from the head, one a line")
    group.add_argument("--pairs", type=place, metavar="FILE", help="names that occur together, two a line with a comma")


def read_split(args: argparse.Namespace) -> Split:
    """The names that a command line asks for. Raises UsageError."""
    if args.vocabulary and args.split and not args.pairs:
        return built_in_split(args.vocabulary, args.split)
    if args.split and not args.vocabulary:
        raise UsageError("--split is of a --vocabulary; give --unseen FILE with your own names")
    words = built_in(args.vocabulary) if args.vocabulary else Vocabulary(read_names(args.names))
    if args.pairs:
        words = Vocabulary(words.names, read_pairs(args.pairs, words.names))
    unseen = built_in_split(args.vocabulary, args.split).unseen if args.split else ()
    return split_of(words, read_names(args.unseen) if args.unseen else unseen)


def examples_parser() -> Parser:
    """Of gd-train examples."""
    parser = parser_of("examples", "Make what a head is trained on: images from a model, masks from a detector.")
    parser.add_argument(
        "--model", type=place, required=True, metavar="BUNDLE", help="gd-export's, such as with --head untrained"
    )
    parser.add_argument(
        "--detector", required=True, metavar="MODEL",
        help="a segmentation model of transformers, in a directory or on the hub; or mask-rcnn, torchvision's",
    )  # fmt: skip
    parser.add_argument("--out", type=place, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--examples", type=int, default=40_000, metavar="N", help="images (default: 40000, the paper's)"
    )
    parser.add_argument("--test", action="store_true", help="also of unseen names: for --validate, not for training")
    add_names(parser)
    parser.add_argument(
        "--pair-share", type=float, default=0.5, metavar="P", help="share of images with two names (0.5)"
    )
    parser.add_argument("--templates", type=place, metavar="FILE", help="your own templates, {} where names go")
    group = parser.add_argument_group("detector")
    group.add_argument(
        "--score", type=float, default=0.5, metavar="P", help="least score of an instance (default: 0.5)"
    )
    group.add_argument(
        "--instances", choices=("all", "first"), default="all",
        help="join all of a name, as the paper does, or take the first, as the released program does (default: all)",
    )  # fmt: skip
    group.add_argument("--aliases", type=place, metavar="FILE", help="labels for your names: name = label, label")
    group.add_argument("--device", default="cpu", help="torch device of the detector (default: cpu)")
    group.add_argument("--detector-batch", type=int, default=8, metavar="N", help="images to one call (default: 8)")
    how = parser.add_argument_group("images, as in gd-infer")
    how.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    how.add_argument("--steps", type=int, default=50)
    how.add_argument("--guidance-scale", type=float, default=5.0, metavar="W")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--batch", type=int, metavar="N")
    how.add_argument("--backend", choices=BACKENDS, default=DEFAULT_BACKEND)
    for name, kind in (("threads", int), ("lanes", int), ("shard-size", int), ("workers", int), ("shard", str)):
        how.add_argument(f"--{name}", type=kind, metavar="I/N" if kind is str else "N")
    how.add_argument("--ray", nargs="?", const="", metavar="ADDRESS")
    return parser


def examples(args: argparse.Namespace, say: Say) -> None:
    """gd-train examples."""
    split = read_split(args)

    from grounded_diffusion.training.detectors.labels import read_aliases
    from grounded_diffusion.training.grounding.examples import TEMPLATES, ExamplesJob, make_examples, table

    fields = ("sampler", "steps", "guidance_scale", "seed", "batch")
    options = Options(guidance_interval=(0.0, 1.0), **{name: getattr(args, name) for name in fields})
    run = ("backend", "threads", "lanes", "shard_size", "workers", "shard", "ray")
    job = ExamplesJob(
        model=args.model, detector=args.detector, split=split, out=args.out, examples=args.examples, test=args.test,
        pair_share=args.pair_share, templates=read_templates(args.templates) if args.templates else TEMPLATES,
        score=args.score, instances=args.instances, aliases=read_aliases(args.aliases) if args.aliases else {},
        device=args.device, detector_batch=args.detector_batch, options=options,
        run={name: getattr(args, name) for name in run},
    )  # fmt: skip
    print(table(make_examples(job, say)))


def real_parser() -> Parser:
    """Of gd-train real."""
    parser = parser_of("real", "Make examples of real images with masks, by DDIM inversion (the paper's C.3).")
    parser.add_argument("--base", required=True, metavar="MODEL", help="Stable Diffusion: a directory or a hub name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--voc", type=place, metavar="DIR", help="VOCdevkit/VOC2012, or a folder of its form")
    source.add_argument("--coco", type=place, metavar="FILE", help="instances of COCO's form")
    source.add_argument("--rendered", type=int, metavar="N", help="N scenes as the shipped model was trained on")
    parser.add_argument("--images", type=place, metavar="DIR", help="with --coco: the folder of its images")
    parser.add_argument("--part", default="train", metavar="NAME", help="with --voc: train, val, ... (default: train)")
    parser.add_argument("--out", type=place, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--limit", type=int, metavar="N", help="look at the first N images only")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (default: the model's)")
    parser.add_argument("--capture-timestep", type=int, default=1, metavar="T", help="of the head (default: 1)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    add_names(parser)
    return parser


def real(args: argparse.Namespace, say: Say) -> None:
    """gd-train real."""
    if args.coco and not args.images:
        raise UsageError("--coco needs --images, the folder of its images")
    split = read_split(args)

    from grounded_diffusion.training.generator.base import FrozenBase
    from grounded_diffusion.training.grounding.annotations import CocoFile, VocFolder
    from grounded_diffusion.training.grounding.real import make_real
    from grounded_diffusion.training.things.scenes import scenes_of

    if args.rendered is not None:
        check_int(args.rendered, "rendered", 1, 10**7)
    base = FrozenBase(args.base, args.device)
    size = (args.size, args.size) if args.size else base.image_size
    if args.rendered:
        found = scenes_of(split.seen, split.seen_pairs, args.rendered, size[0])
    else:
        found = VocFolder.open(args.voc, args.part) if args.voc else CocoFile.open(args.coco, args.images)
    count = make_real(
        found, split, base, args.out, size=size, capture_timestep=args.capture_timestep, limit=args.limit, say=say
    )
    print(f"{count} examples of {len(found)} images in {args.out}")


def head_parser() -> Parser:
    """Of gd-train head."""
    parser = parser_of("head", "Train a grounding head on examples; writes a checkpoint that gd-export takes.")
    parser.add_argument("--base", required=True, metavar="MODEL", help="Stable Diffusion: a directory or a hub name")
    parser.add_argument("--examples", type=place, nargs="+", required=True, metavar="DIR", help="what to train on")
    parser.add_argument("--validate", type=place, nargs="+", default=[], metavar="DIR", help="examples to measure on")
    parser.add_argument("--out", type=place, required=True, metavar="DIR", help="the checkpoint directory to write")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="settings to begin with (default: paper)")
    parser.add_argument(
        "--config", type=place, metavar="FILE", help="TOML file of settings, with a table [head] of sizes"
    )
    parser.add_argument("--variant", choices=("released", "paper"), help="form of the head (default: released)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--presence", action="store_true", help="also tell whether an object is there at all")
    parser.add_argument("--tensorboard", action="store_true", help="write curves for TensorBoard")
    group = parser.add_argument_group("settings, in place of the preset's and the file's")
    for name in WHOLE:
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    for name in REAL:
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X")
    for name, known in CHOICES.items():
        group.add_argument(f"--{name.replace('_', '-')}", choices=known)
    return parser


def head(args: argparse.Namespace, say: Say) -> None:
    """gd-train head."""
    names = (*WHOLE, *REAL, *CHOICES)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = build(args.preset, args.config, given, args.variant)

    from grounded_diffusion.training.grounding.head import HeadJob, train_head

    places = (args.base, args.examples, args.out, config, args.validate, args.device)
    train_head(HeadJob(*places, args.tensorboard, args.presence), say)


def distill_parser() -> Parser:
    """Of gd-train distill."""
    parser = parser_of(
        "distill", "Train a student that draws in a few unguided steps; writes a LoRA file.", distill.EXAMPLES
    )
    distill.add_options(parser)
    return parser


COMMANDS = {
    "examples": (examples_parser, examples),
    "real": (real_parser, real),
    "head": (head_parser, head),
    "distill": (distill_parser, distill.distill),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line of one of COMMANDS, whose name comes first."""
    args = COMMANDS[argv[0]][0]().parse_args(argv[1:])
    args.command = argv[0]
    return args


def run(args: argparse.Namespace) -> None:
    """Run a command."""

    def say(line: str) -> None:
        print(f"gd-train: {line}", flush=True)

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("gd-train: %(message)s"))
    logger = logging.getLogger("grounded_diffusion")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        COMMANDS[args.command][1](args, say)
    finally:
        logger.removeHandler(handler)
