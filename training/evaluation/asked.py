"""What a command line of gd-eval asks for: the names, the heads, the workplace, the plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grounded_diffusion.engine.pipeline.shipped import shipped_checkpoint
from grounded_diffusion.engine.prompts.vocabulary import Vocabulary, built_in, read_names, read_pairs
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.checkpoint import load_checkpoint
from grounded_diffusion.training.detectors.labels import read_aliases
from grounded_diffusion.training.evaluation.ablations import Setting
from grounded_diffusion.training.evaluation.lab import Detectors, Lab, Say
from grounded_diffusion.training.evaluation.paper import TITLES
from grounded_diffusion.training.evaluation.protocol1 import TestSize, fewer_pairs, rendered
from grounded_diffusion.training.evaluation.table import Plan, Trained
from grounded_diffusion.training.fingerprint import weights_digest
from grounded_diffusion.training.grounding.annotations import CocoFile, VocFolder
from grounded_diffusion.training.grounding.config import build
from grounded_diffusion.training.grounding.splits import UNSEEN, Split, built_in_split, split_of
from grounded_diffusion.training.things.scenes import scenes_of
from grounded_diffusion.training.things.world import NAMES


def read_splits(args: argparse.Namespace, known: dict[str, Any]) -> tuple[str, dict[str, Split]]:
    """(title, splits by name) that a command line asks for; `known` are the names of the checkpoint.

    Of a built-in vocabulary, --rendered takes the names that the checkpoint knows, or else that scenes can show.
    """
    if args.vocabulary and not args.unseen and not args.pairs:
        numbers = args.split or range(1, len(UNSEEN[args.vocabulary]) + 1)
        splits = {f"split{n}": built_in_split(args.vocabulary, n) for n in numbers}
        if args.rendered:
            drawn = [name for part in ("seen", "unseen") for name in known.get(part, ())] or NAMES
            splits = {label: split.among(drawn) for label, split in splits.items()}
        return TITLES[args.vocabulary], splits
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


def open_lab(args: argparse.Namespace, say: Say) -> tuple[Lab, tuple[Trained, ...]]:
    """The workplace that a command line describes, and the trained heads that there are."""
    if args.base and args.heads:
        raise UsageError("--heads are of the model of --ckpt; leave out --base")
    trained = () if args.base else trained_heads([Path(args.ckpt or shipped_checkpoint()), *args.heads])
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


def trained_heads(places: Sequence[Path]) -> tuple[Trained, ...]:
    """The heads of checkpoints of one model. Raises UsageError where they are of several."""
    found, digests = [], []
    for place in places:
        checkpoint = load_checkpoint(place)
        found.append(Trained(checkpoint.head, checkpoint.names, checkpoint.presence))
        digests.append(weights_digest(checkpoint.unet))
        if digests[-1] != digests[0]:
            raise UsageError(f"the head of {place} was trained on another model than {places[0]}")
    return tuple(found)


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


def plan_of(args: argparse.Namespace, lab: Lab, trained: tuple[Trained, ...]) -> Plan:
    """The plan that a command line describes."""
    if args.coco and not args.images:
        raise UsageError("--coco needs --images, the folder of its images")
    title, splits = read_splits(args, trained[0].names if trained else {})
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


def setting_of(args: argparse.Namespace, lab: Lab, splits: dict[str, Split]) -> Setting:
    """What an ablation varies, by a command line."""
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
