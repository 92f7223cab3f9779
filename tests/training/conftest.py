"""A small random model with a bundle to make examples with, a small random detector, and examples of the two."""

import shutil

import pytest
from helpers.detector import save_mask2former

from grounded_diffusion.training import cli

NAMES = ("dog", "cat", "deer", "tv monitor")


def gd_train(*arguments):
    """The exit status of gd-train."""
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session", autouse=True)
def once(traces):
    """Equal modules are traced once."""


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """A detector that knows the four names, "tv monitor" as "tv", and another."""
    return save_mask2former(tmp_path_factory.mktemp("detector"), ["cat", "deer", "dog", "tv", "zebra"])


@pytest.fixture(scope="session")
def base(small_checkpoint, tmp_path_factory):
    """A small model without its head."""
    path = shutil.copytree(small_checkpoint, tmp_path_factory.mktemp("base") / "tiny")
    shutil.rmtree(path / "grounding_head")
    return path


@pytest.fixture(scope="session")
def base_bundle(base, tmp_path_factory):
    """Its bundle, as gd-export --head untrained makes it."""
    from grounded_diffusion.export import cli as export

    path = tmp_path_factory.mktemp("base") / "bundle"
    assert export.main(["--base", str(base), "--head", "untrained", "--no-verify", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Options that name the names: three seen, one unseen, two pairs."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "names.txt").write_text("\n".join(NAMES))
    (folder / "unseen.txt").write_text("deer\n")
    (folder / "pairs.txt").write_text("dog, cat\ncat, tv monitor\ndeer, dog\n")
    return ["--names", folder / "names.txt", "--unseen", folder / "unseen.txt", "--pairs", folder / "pairs.txt"]


@pytest.fixture(scope="session")
def example_options(base_bundle, detector, words):
    """Options of gd-train examples for the three."""
    model = ["--model", base_bundle, "--detector", detector, "--score", 0, "--threads", 1]
    return [*model, *words, "--steps", 3, "--examples", 24, "--batch", 4, "--shard-size", 8]


@pytest.fixture(scope="session")
def examples(example_options, tmp_path_factory):
    """Twenty-four examples. Do not write to them."""
    path = tmp_path_factory.mktemp("examples") / "train"
    assert gd_train("examples", *example_options, "--out", path) == 0
    return path


@pytest.fixture(scope="session")
def held_out(example_options, tmp_path_factory):
    """Eight examples of all names."""
    path = tmp_path_factory.mktemp("examples") / "test"
    assert gd_train("examples", *example_options, "--examples", 8, "--seed", 9, "--test", "--out", path) == 0
    return path
