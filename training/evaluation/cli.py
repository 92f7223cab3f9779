"""gd-eval: the paper's tables on your model, judged by your detector."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND
from grounded_diffusion.engine.checks import check_int, usable_cores
from grounded_diffusion.engine.cli.common import Parser, run_command
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import local_path
from grounded_diffusion.training.evaluation.paper import ABLATIONS, KINDS, METHODS, METHODS_2, TITLES
from grounded_diffusion.training.grounding.config import PRESETS

EXAMPLES = """\
examples:
  gd-eval protocol1 --vocabulary voc --rendered --preset quick --examples 2000 --out runs/pascal
  gd-eval ablation zero-masks --vocabulary voc --split 1 --preset quick --examples 2000 --out runs/pascal
  gd-eval protocol2 --vocabulary voc --split 1 --rendered --per-name 100 --per-pair 8 \\
      --network-iterations 1500 --network-batch 32 --out runs/pascal
  gd-eval report runs/protocol1 runs/protocol2
  gd-eval protocol1 --base sd15/ --detector facebook/mask2former-swin-large-coco-instance --second mask-rcnn \\
      --vocabulary voc --split 1 2 3 --voc VOCdevkit/VOC2012 --device cuda --out runs/pascal

The same command given again goes on where it was stopped, and measures nothing twice.
"""
TRUTH, PAGE = Path("bench/results/truth.json"), Path("docs/results.md")
Say = Callable[[str], None]


def build_parser() -> argparse.ArgumentParser:
    """The parser of gd-eval."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser("gd-eval", description=__doc__, epilog=EXAMPLES, formatter_class=shape, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    table = kinds.add_parser("protocol1", parents=[common()], formatter_class=shape, help="Table 1: heads, and DAAM")
    table.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS),
        help="head (trained), presence (the same without absent names), paper_form, attention, daam, second (the "
        "second detector, on the same images) (default: all)",
    )  # fmt: skip
    learnt = kinds.add_parser(
        "protocol2", parents=[common()], formatter_class=shape, help="Table 2: a network trained on generated images"
    )
    add_protocol2(learnt)
    ablation = kinds.add_parser(
        "ablation", parents=[common()], formatter_class=shape, help="one of the paper's ablations"
    )
    ablation.add_argument("ablation", choices=ABLATIONS, help="Fig. 7, Tables 3, 5, 6 and 7, in this order")
    add_ablation(ablation)
    report = kinds.add_parser("report", help="the page of results, of what has been measured")
    report.add_argument(
        "runs", type=local_path, nargs="*", metavar="RUN", help="folders of the others, to add their figures"
    )
    report.add_argument(
        "--truth", type=local_path, default=TRUTH, metavar="FILE", help=f"all figures (default: {TRUTH})"
    )
    report.add_argument("--out", type=local_path, default=PAGE, metavar="FILE", help=f"the page (default: {PAGE})")
    return parser


def common() -> argparse.ArgumentParser:
    """What all measurements have; made anew for each, as their defaults differ."""
    parser = argparse.ArgumentParser(add_help=False)
    add_model(parser)
    add_names(parser)
    add_sizes(parser)
    return parser


def add_protocol2(parser: argparse.ArgumentParser) -> None:
    """What is trained, on whose masks. The numbers of images are the paper's."""
    parser.set_defaults(per_name=500, per_pair=71)
    group = parser.add_argument_group("the network")
    group.add_argument(
        "--methods", nargs="+", choices=METHODS_2, default=list(METHODS_2[:4]),
        help="whose masks it learns: head (trained), exact (of rendered or annotated images: the bound), judge (the "
        "detector's), daam, presence, paper_form, attention (default: the first four)",
    )  # fmt: skip
    group.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS),
        help="images of one object, of two, or both, for the trained head; others have the last (default: all three)",
    )  # fmt: skip
    about = "checkpoint of transformers to start from: MaskFormer, Mask2Former or a semantic one"
    group.add_argument("--network", metavar="MODEL", help=f"{about} (default: a small UPerNet from scratch)")
    group.add_argument("--network-iterations", type=int, default=40_000, metavar="N", help="steps (default: 40000)")
    group.add_argument("--network-batch", type=int, default=8, metavar="N", help="images a step (default: 8)")
    group.add_argument("--test-images", type=int, default=1449, metavar="N", help="with --rendered (default: 1449)")
    add_training_images(parser, "exact")


def add_training_images(parser: argparse.ArgumentParser, what: str) -> None:
    """Annotated images that something is trained on."""
    group = parser.add_argument_group(f"annotated images to train on, for {what}")
    group.add_argument("--train-part", default="train", metavar="NAME", help="with --voc (default: train)")
    group.add_argument("--train-coco", type=local_path, metavar="FILE", help="with --coco: instances to train on")
    group.add_argument("--train-images", type=local_path, metavar="DIR", help="the folder of their images")


def add_ablation(parser: argparse.ArgumentParser) -> None:
    """What each of them varies."""
    group = parser.add_argument_group("what is varied")
    group.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="timestep: 1 is the last step (1 to 801)")
    group.add_argument("--missed", type=float, metavar="P", help="zero-masks: share of masks that are missed (0.4)")
    group.add_argument("--counts", type=int, nargs="+", metavar="N", help="seen-names: numbers of them (quarters)")
    group.add_argument("--real-images", type=int, default=10_000, metavar="N", help="real: annotated ones (10000)")
    add_training_images(parser, "real")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Whose images, judged by whom."""
    group = parser.add_argument_group("model and detectors")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--ckpt", type=local_path, metavar="DIR", help="checkpoint with its head (default: the shipped one)"
    )
    source.add_argument("--base", metavar="MODEL", help="Stable Diffusion without a head: a directory or a hub name")
    group.add_argument(
        "--heads", type=local_path, nargs="+", default=[], metavar="DIR",
        help="with --ckpt: checkpoints of the same model, whose heads are taken for the splits they were kept from",
    )  # fmt: skip
    group.add_argument(
        "--model", type=local_path, metavar="BUNDLE", help="its bundle (default: it is exported into --out)"
    )
    about = "a segmentation model of transformers, in a directory or on the hub; or mask-rcnn, torchvision's"
    group.add_argument("--detector", metavar="MODEL", help=f"the judge: {about} (default: judge/ of the checkpoint)")
    group.add_argument("--second", metavar="MODEL", help="another; images count on which both agree")
    group.add_argument("--labeller", metavar="MODEL", help="labels the images that heads are trained on (the judge)")
    group.add_argument("--score", type=float, default=0.5, metavar="P", help="least score of an instance (0.5)")
    group.add_argument("--aliases", type=local_path, metavar="FILE", help="labels for your names: name = label, label")
    group.add_argument("--device", default="cpu", help="torch device of heads and detectors (default: cpu)")
    how = parser.add_argument_group("images, as in gd-infer")
    how.add_argument("--steps", type=int, default=50, help="of ddim (default: 50)")
    how.add_argument("--guidance-scale", type=float, default=5.0, metavar="W")
    how.add_argument("--batch", type=int, metavar="N")
    how.add_argument("--backend", choices=BACKENDS, default=DEFAULT_BACKEND)
    how.add_argument("--threads", type=int, default=usable_cores(), metavar="N", help="CPU threads (default: all)")
    how.add_argument("--lanes", type=int, metavar="N")


def add_names(parser: argparse.ArgumentParser) -> None:
    """Which names, in which splits, and images whose masks are known."""
    group = parser.add_argument_group("names")
    words = group.add_mutually_exclusive_group()
    words.add_argument("--vocabulary", choices=TITLES, help="default: the names of the checkpoint")
    words.add_argument("--names", type=local_path, metavar="FILE", help="your own names, one a line")
    unseen = group.add_mutually_exclusive_group()
    unseen.add_argument("--split", type=int, nargs="+", metavar="N", help="of the vocabulary, from 1 (default: all)")
    unseen.add_argument("--unseen", type=local_path, metavar="FILE", help="names that are kept from the head")
    group.add_argument(
        "--pairs", type=local_path, metavar="FILE", help="names that occur together, two a line with a comma"
    )
    exact = parser.add_argument_group("the exact track: images whose masks are known")
    source = exact.add_mutually_exclusive_group()
    source.add_argument("--rendered", action="store_true", help="scenes as the shipped model was trained on")
    source.add_argument("--voc", type=local_path, metavar="DIR", help="VOCdevkit/VOC2012, or a folder of its form")
    source.add_argument("--coco", type=local_path, metavar="FILE", help="instances of COCO's form")
    exact.add_argument("--images", type=local_path, metavar="DIR", help="with --coco: the folder of its images")
    exact.add_argument("--part", default="val", metavar="NAME", help="with --voc: train, val, ... (default: val)")
    exact.add_argument("--limit", type=int, metavar="N", help="look at the first N annotated images only")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """How much of everything."""
    group = parser.add_argument_group("sizes; the defaults are the paper's")
    group.add_argument("--per-name", type=int, default=30, metavar="N", help="images of each name (default: 30)")
    group.add_argument("--per-pair", type=int, default=5, metavar="N", help="images of each pair (default: 5)")
    group.add_argument("--most-pairs", type=int, default=0, metavar="N", help="pairs at most, evenly (default: all)")
    group.add_argument("--agreement", type=float, default=0.75, metavar="P", help="least IoU of two detectors (0.75)")
    group.add_argument("--examples", type=int, default=40_000, metavar="N", help="images to train a head on (40000)")
    group.add_argument("--preset", choices=PRESETS, default="paper", help="settings of the training (default: paper)")
    group.add_argument("--config", type=local_path, metavar="FILE", help="TOML file of settings, as of gd-train head")
    group.add_argument("--iterations", type=int, metavar="N", help="in place of the preset's")
    group.add_argument("--out", type=local_path, required=True, metavar="DIR", help="folder for all that is made")


def protocol1(args: argparse.Namespace, say: Say) -> None:
    """gd-eval protocol1."""
    from dataclasses import replace

    from grounded_diffusion.training.evaluation.asked import open_lab, plan_of
    from grounded_diffusion.training.evaluation.table import run_table

    lab, trained = open_lab(args, say)
    plan = replace(plan_of(args, lab, trained), methods=tuple(args.methods))
    figures = run_table(lab, plan)
    print(f"{len(figures)} figures in {args.out / 'figures.json'}")


def protocol2(args: argparse.Namespace, say: Say) -> None:
    """gd-eval protocol2."""
    from dataclasses import replace

    from grounded_diffusion.training.detectors.network import Network
    from grounded_diffusion.training.evaluation.asked import open_lab, plan_of
    from grounded_diffusion.training.evaluation.protocol2 import Study, run_protocol2, scenes
    from grounded_diffusion.training.grounding.annotations import CocoFile, VocFolder

    check_int(args.test_images, "test_images", 1, 10**6)
    network = Network(args.network, args.network_iterations, args.network_batch)
    lab, trained = open_lab(args, say)
    plan = replace(plan_of(args, lab, trained), methods=tuple(args.methods))
    exact = None
    if args.voc:
        test = VocFolder.open(args.voc, args.part)
        exact = lambda: VocFolder.open(args.voc, args.train_part)
    elif args.coco:
        test = CocoFile.open(args.coco, args.images)
        if args.train_coco and args.train_images:
            exact = lambda: CocoFile.open(args.train_coco, args.train_images)
    elif args.rendered:
        test, exact = scenes(lab, plan, args.test_images)
    else:
        raise UsageError("networks are tested on images with known masks; give --rendered, --voc or --coco")
    pairs = plan.size.per_pair and next(iter(plan.splits.values())).pairs
    kinds = tuple(kind for kind in KINDS if kind in args.kinds and (pairs or kind == "one"))
    if not kinds:
        raise UsageError("there are no pairs to make images of two objects of; give --kinds one")
    figures = run_protocol2(lab, Study(plan, network, test, exact, kinds))
    print(f"{len(figures)} figures in {args.out / 'figures.json'}")


def ablation(args: argparse.Namespace, say: Say) -> None:
    """gd-eval ablation."""
    from grounded_diffusion.training.evaluation.ablations import run_ablation
    from grounded_diffusion.training.evaluation.asked import open_lab, plan_of, setting_of

    lab, trained = open_lab(args, say)
    plan = plan_of(args, lab, trained)
    figures = run_ablation(lab, plan, setting_of(args, lab, plan.splits), args.ablation)
    print(f"{len(figures)} figures in {args.out / 'figures.json'}")


def report(args: argparse.Namespace, say: Say) -> None:
    """gd-eval report."""
    from grounded_diffusion.training.evaluation.report.page import write_report

    figures = write_report(args.runs, args.truth, args.out)
    print(f"{len(figures)} figures in {args.out}")


COMMANDS = {"protocol1": protocol1, "protocol2": protocol2, "ablation": ablation, "report": report}


def run(args: argparse.Namespace) -> None:
    """Run a command."""

    def say(line: str) -> None:
        print(f"gd-eval: {line}", flush=True)

    for name in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{name}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("grounded_diffusion").setLevel(logging.INFO)
    if getattr(args, "threads", None):
        import torch

        torch.set_num_threads(args.threads)
    COMMANDS[args.command](args, say)


def main(argv: list[str] | None = None) -> int:
    """Exit status of gd-eval."""
    kept = "interrupted; the same command goes on where it was"
    return run_command("gd-eval", lambda: run(build_parser().parse_args(argv)), {}, interrupted=kept, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
