"""Algorithm 1's prompts: one seen name, or two that occur together, in a template.

The paper draws them at random until it has enough. Here every name and every pair gets its even share, in an order
mixed by the seed, so that the first thousand of a larger set are a fair sample too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from grounded_diffusion.engine.prompts.prompt import Prompt
from grounded_diffusion.errors import UsageError

TEMPLATES = (("a photograph of a {}",), ("a photograph of a {} and a {}",))  # the paper's, for one name and for two
MAX_EXAMPLES = 10_000_000


def mixed(items: Sequence, seed: int, what: str) -> list:
    """Items in an order that hangs on the seed alone: the same on every machine and Python."""
    order = [hashlib.sha256(f"{seed}:{what}:{k}".encode()).digest() for k in range(len(items))]
    return [items[k] for k in sorted(range(len(items)), key=order.__getitem__)]


def spread(entries: Sequence[tuple[str, ...]], templates: Sequence[str], count: int) -> Iterator[Prompt]:
    """`count` prompts, evenly over the entries and, for each, over the templates."""
    for k in range(count):
        names = entries[k % len(entries)]
        yield Prompt(templates[k // len(entries) % len(templates)].format(*names), names, count=1)


def draw_prompts(
    names: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    count: int,
    *,
    pair_share: float = 0.5,
    templates: tuple[Sequence[str], Sequence[str]] = TEMPLATES,
    seed: int = 0,
) -> list[Prompt]:
    """Prompts of `count` images, one each.

    Args:
        pair_share: share of the images with two names; where there are no pairs all have one.
        templates: for one name and for two.

    Raises:
        UsageError: a count or share outside its range, or no template for what is asked.
    """
    if not 1 <= count <= MAX_EXAMPLES or not 0 <= pair_share <= 1:
        raise UsageError(f"examples must be from 1 to {MAX_EXAMPLES} and the share of pairs in [0, 1]")
    doubles = round(count * pair_share) if pairs else 0
    prompts: list[Prompt] = []
    singles = [(name,) for name in names]
    for entries, forms, share in ((singles, templates[0], count - doubles), (pairs, templates[1], doubles)):
        if share and not forms:
            raise UsageError("there is no template for prompts of one name, or of two; add one to --templates")
        prompts += spread(mixed(entries, seed, "entries"), forms, share)
    return mixed(prompts, seed, "prompts")
