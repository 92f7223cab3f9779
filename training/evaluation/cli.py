"""gd-eval: the paper's tables on your model, judged by your detector."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND
from grounded_diffusion.engine.checks import check_int, usable_cores
from grounded_diffusion.engine.cli.common import Parser, run_command
from grounded_diffusion.engine.pipeline.shipped import shipped_checkpoint
from grounded_diffusion.engine.prompts.vocabulary import Vocabulary, built_in, read_names, read_pairs
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import local_path
from grounded_diffusion.training.evaluation.paper import ABLATIONS, METHODS, METHODS_2
from grounded_diffusion.training.grounding.config import PRESETS, build
from grounded_diffusion.training.grounding.splits import UNSEEN, Split, built_in_split, split_of

TITLES = {"voc": "pascal", "coco": "coco", "things-64": "things"}
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
        help="head (trained), presence (the same without absent names), paper_form, attention, daam (default: all)",
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


def read_splits(args: argparse.Namespace, known: dict[str, Any]) -> tuple[str, dict[str, Split]]:
    """(title, splits by name) that a command line asks for; `known` are the names of the checkpoint."""
    if args.vocabulary and not args.unseen and not args.pairs:
        numbers = args.split or range(1, len(UNSEEN[args.vocabulary]) + 1)
        return TITLES[args.vocabulary], {f"split{n}": built_in_split(args.vocabulary, n) for n in numbers}
    if args.split:
        raise UsageError("--split is of a --vocabulary, without --unseen and --pairs")
    if args.vocabulary or args.names:
        words = built_in(args.vocabulary) if args.vocabulary else Vocabulary(read_names(args.names))
        unseen = read_names(args.unseen) if args.unseen else ()
    else:
        unseen = tuple(known.get("unseen", ()))
        words = Vocabulary((*known.get("seen", ()), *unseen))
    if args.pairs:
        words = Vocabulary(words.names, read_pairs(args.pairs, words.names))
    elif not args.vocabulary:
        words = Vocabulary(words.names, tuple((a, b) for i, a in enumerate(words.names) for b in words.names[i + 1 :]))
    return TITLES.get(args.vocabulary, "own"), {"split1": split_of(words, unseen)}


def open_lab(args: argparse.Namespace, say: Say):
    """The workplace that a command line describes, and the trained head, if there is one."""
    from grounded_diffusion.training.checkpoint import load_checkpoint
    from grounded_diffusion.training.detectors.labels import read_aliases
    from grounded_diffusion.training.evaluation.lab import Detectors, Lab
    from grounded_diffusion.training.evaluation.table import Trained

    trained = None
    if not args.base:
        checkpoint = load_checkpoint(args.ckpt or shipped_checkpoint())
        trained = Trained(checkpoint.head, checkpoint.names, checkpoint.presence)
    options = Options(
        sampler="ddim", steps=args.steps, guidance_scale=args.guidance_scale, guidance_interval=(0.0, 1.0),
        batch=args.batch,
    )  # fmt: skip
    aliases = read_aliases(args.aliases) if args.aliases else {}
    detectors = Detectors(*detectors_of(args), args.score, aliases)
    run = dict(backend=args.backend, threads=args.threads, lanes=args.lanes)
    base = args.base or args.ckpt or shipped_checkpoint()
    return Lab(
        base, args.out, detectors, model=args.model, options=options, run=run, device=args.device, say=say
    ), trained


def detectors_of(args: argparse.Namespace) -> tuple[str, str | None, str | None]:
    """(judge, second judge, labeller): those of the command line, else those that a checkpoint brings."""
    if args.detector:
        return args.detector, args.second, args.labeller
    checkpoint = None if args.base else Path(args.ckpt or shipped_checkpoint())
    if checkpoint is None or not (checkpoint / "judge").is_dir():
        place = args.base or checkpoint
        raise UsageError(f"{place} brings no judge; give --detector a segmentation model that knows its names")
    labeller = str(checkpoint / "labeller") if (checkpoint / "labeller").is_dir() else None
    return str(checkpoint / "judge"), args.second or labeller, args.labeller or labeller


def plan_of(args: argparse.Namespace, lab, trained):
    """The plan that a command line describes."""
    from grounded_diffusion.training.evaluation.protocol1 import TestSize, fewer_pairs, rendered
    from grounded_diffusion.training.evaluation.table import Plan
    from grounded_diffusion.training.grounding.annotations import CocoFile, VocFolder

    if args.coco and not args.images:
        raise UsageError("--coco needs --images, the folder of its images")
    title, splits = read_splits(args, trained.names if trained else {})
    splits = fewer_pairs(splits, args.most_pairs)
    size = TestSize(args.per_name, args.per_pair, args.agreement)
    given = {"iterations": args.iterations} if args.iterations else {}
    annotations = None
    if args.voc:
        annotations = lambda: VocFolder.open(args.voc, args.part)
    elif args.coco:
        annotations = lambda: CocoFile.open(args.coco, args.images)
    elif args.rendered:
        annotations = lambda: rendered(lab, next(iter(splits.values())), size)
    return Plan(
        title, splits, size, build(args.preset, args.config, given), args.examples, trained=trained,
        annotations=annotations, limit=args.limit,
    )  # fmt: skip


def protocol1(args: argparse.Namespace, say: Say) -> None:
    """gd-eval protocol1."""
    from dataclasses import replace

    from grounded_diffusion.training.evaluation.table import run_table

    lab, trained = open_lab(args, say)
    plan = replace(plan_of(args, lab, trained), methods=tuple(args.methods))
    figures = run_table(lab, plan)
    print(f"{len(figures)} figures in {args.out / 'figures.json'}")


def protocol2(args: argparse.Namespace, say: Say) -> None:
    """gd-eval protocol2."""
    from dataclasses import replace

    from grounded_diffusion.training.detectors.network import Network
    from grounded_diffusion.training.evaluation.protocol2 import KINDS, Study, run_protocol2, scenes
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
    pairs = next(iter(plan.splits.values())).pairs
    kinds = KINDS if pairs and plan.size.per_pair else KINDS[:1]
    figures = run_protocol2(lab, Study(plan, network, test, exact, kinds))
    print(f"{len(figures)} figures in {args.out / 'figures.json'}")


def setting_of(args: argparse.Namespace, lab, splits: dict[str, Split]):
    """What an ablation varies, by a command line."""
    from grounded_diffusion.training.evaluation.ablations import Setting
    from grounded_diffusion.training.grounding.annotations import CocoFile, VocFolder
    from grounded_diffusion.training.things.scenes import scenes_of

    split = next(iter(splits.values()))
    given = {name: getattr(args, name) for name in ("timesteps", "missed", "counts") if getattr(args, name) is not None}
    training = None
    if args.voc:
        training = lambda: VocFolder.open(args.voc, args.train_part)
    elif args.coco and args.train_coco and args.train_images:
        training = lambda: CocoFile.open(args.train_coco, args.train_images)
    elif args.coco and args.ablation == "real":
        raise UsageError("this ablation trains on annotated images; give --train-coco and --train-images too")
    elif args.rendered:
        training = lambda: scenes_of(split.seen, split.seen_pairs, args.real_images, lab.base.image_size[0])
    return Setting(split, **given, training=training, training_limit=None if args.rendered else args.real_images)


def ablation(args: argparse.Namespace, say: Say) -> None:
    """gd-eval ablation."""
    from grounded_diffusion.training.evaluation.ablations import run_ablation

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
