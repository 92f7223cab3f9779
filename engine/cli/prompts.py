"""gd-prompts: a prompt file from names, pairs of names and counts (Algorithm 2 and B.3 of the paper).

The paper draws names at random until it has enough images. Here every name and every pair gets its exact count, which
is what the paper's totals (500 x 20 and 71 x 142) amount to. Exit status: 0 done, 2 an option or file cannot be used.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path

from grounded_diffusion.engine.cli import common
from grounded_diffusion.engine.cli.completion import add_completion_option
from grounded_diffusion.engine.prompts.prompt import MAX_COUNT, Prompt, to_line
from grounded_diffusion.engine.prompts.templates import BUILT_IN as TEMPLATES
from grounded_diffusion.engine.prompts.templates import PAPER
from grounded_diffusion.engine.prompts.vocabulary import (
    BUILT_IN,
    Vocabulary,
    built_in,
    read_lines,
    read_names,
    read_pairs,
)
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import check_target, local_path, readable_errors, writing

MAX_SHUFFLED = 2_000_000  # lines, which are in memory at once
MAX_TEMPLATE = 1000  # characters; a text encoder reads 77 words or so
EXAMPLES = """\
examples:
  gd-prompts --vocabulary voc --out prompts.jsonl                  10,000 images of a name, 10,082 of a pair
  gd-prompts --vocabulary voc --templates varied --out prompts.jsonl
  gd-prompts --names names.txt --pairs pairs.txt --per-name 100 --per-pair 20 --out prompts.jsonl

files:
  names       one name a line
  pairs       two names a line, with a comma between
  templates   one template a line; {} stands for a name, so those with one {} are for names, with two for pairs;
              varied, in the place of a file, has 504 sentences of different views, places and light
"""


def build_parser() -> common.Parser:
    parser = common.Parser(
        prog="gd-prompts",
        description="Write a prompt file for gd-infer from a vocabulary.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_completion_option(parser)
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument("--vocabulary", metavar="NAME", help="voc, coco, or things-64 (the names of the shipped model)")
    words.add_argument("--names", metavar="NAMES", help="your own names, in a file; or as --vocabulary")
    parser.add_argument("--pairs", type=local_path, metavar="FILE", help="your own pairs (default: the vocabulary's)")
    parser.add_argument("--per-name", type=int, default=500, metavar="N", help="images of each name (default: 500)")
    parser.add_argument("--per-pair", type=int, default=71, metavar="N", help="images of each pair (default: 71)")
    parser.add_argument(
        "--templates", default="paper", metavar="NAME",
        help=f"{' or '.join(TEMPLATES)}, or your own in a file (default: paper, which is {PAPER[0]!r})",
    )  # fmt: skip
    parser.add_argument("--shuffle-seed", type=int, metavar="N", help="a line an image, in mixed order")
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE", help="prompt file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    return parser


def choose_templates(given: str) -> tuple[list[str], list[str]]:
    """(for names, for pairs) of the option."""
    return TEMPLATES[given] if given in TEMPLATES else read_templates(Path(given))


def read_templates(path: Path) -> tuple[list[str], list[str]]:
    """(for names, for pairs). Raises UsageError, with the line."""
    found: dict[int, list[str]] = {1: [], 2: []}
    for number, line in read_lines(path, "template"):
        line, places = " ".join(line.split()), line.count("{}")
        if places not in found or set(line.replace("{}", "")) & set("[]{}"):
            raise UsageError(f"{path}:{number}: write {{}} once or twice, where names go, and no other brackets")
        if len(line) > MAX_TEMPLATE:
            raise UsageError(f"{path}:{number}: the template has {len(line):,} characters; at most {MAX_TEMPLATE:,}")
        if line in found[places]:
            raise UsageError(f"{path}:{number}: the template {line!r} occurs twice")
        found[places].append(line)
    return found[1], found[2]


def spread(words: Sequence[tuple[str, ...]], templates: list[str], count: int) -> Iterator[Prompt]:
    """Prompts with their counts: `count` images of each entry, spread over the templates, the first ones taking the
    rest."""
    for names in words:
        for k, template in enumerate(templates):
            if share := count // len(templates) + (k < count % len(templates)):
                yield Prompt(template.format(*names), names, count=share)


def shuffled(prompts: list[Prompt], seed: int) -> list[Prompt]:
    """One prompt an image, ordered by a hash of seed and place: the same on every machine and Python."""
    singles = [one for prompt in prompts for one in repeat(replace(prompt, count=1), prompt.count or 1)]
    order = [hashlib.sha256(f"{seed}:{k}".encode()).digest() for k in range(len(singles))]
    return [singles[k] for k in sorted(range(len(singles)), key=order.__getitem__)]


def choose_vocabulary(args: argparse.Namespace) -> Vocabulary:
    """The vocabulary of the options."""
    name = args.vocabulary or args.names
    known = built_in(name) if args.vocabulary or name in BUILT_IN else Vocabulary(read_names(name))
    return Vocabulary(known.names, read_pairs(args.pairs, known.names)) if args.pairs else known


def check_replaced(args: argparse.Namespace) -> None:
    """Raise UsageError where --out is a file that is no prompt file, or one that this command reads."""
    if args.out.exists():
        check_target(args.out, "out", (".jsonl", ".txt"))
        for given in (args.names, args.pairs, args.templates):
            if given is not None and Path(given).exists() and args.out.samefile(given):
                raise UsageError(f"--out {args.out} is one of the files to read; give it another name")


def run(args: argparse.Namespace) -> None:
    for name in ("per_name", "per_pair"):
        if not 0 <= getattr(args, name) <= MAX_COUNT:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} must be from 0 to {MAX_COUNT}, not {getattr(args, name)}")
    if args.out.is_dir() or (args.out.exists() and not args.overwrite):
        raise UsageError(f"{args.out} exists; choose another --out" + ("" if args.out.is_dir() else ", or --overwrite"))
    check_replaced(args)
    vocabulary = choose_vocabulary(args)
    single, double = choose_templates(args.templates)
    names = [(name,) for name in vocabulary.names] if args.per_name else []
    pairs = list(vocabulary.pairs) if args.per_pair else []
    for words, templates, what, option in ((names, single, "one {}", "name"), (pairs, double, "two {}", "pair")):
        if words and not templates:
            raise UsageError(f"{args.templates} has no template with {what}; add one, or give --per-{option} 0")
    prompts = [*spread(names, single, args.per_name), *spread(pairs, double, args.per_pair)]
    if not prompts:
        raise UsageError("nothing to make; raise --per-name, or --per-pair with a vocabulary that has pairs")
    if args.shuffle_seed is not None:
        if (lines := sum(prompt.count or 1 for prompt in prompts)) > MAX_SHUFFLED:
            raise UsageError(
                f"--shuffle-seed has {lines:,} lines to mix, and mixes at most {MAX_SHUFFLED:,}; leave it out, or "
                "lower --per-name or --per-pair"
            )
        prompts = shuffled(prompts, args.shuffle_seed)
    with readable_errors(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with writing(args.out) as stream:
            stream.writelines(f"{to_line(prompt)}\n".encode() for prompt in prompts)
    ones, twos = len(names) * args.per_name, len(pairs) * args.per_pair
    print(f"{ones:,} images of {len(names)} names and {twos:,} of {len(pairs)} pairs in {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return common.run_command("gd-prompts", lambda: run(build_parser().parse_args(argv)), {}, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
