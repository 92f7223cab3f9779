"""Options of gd-eval for the tiny model, small enough for seconds."""

import pytest

HEAD = """
batch = 4
validate_every = 0
[head]
embed_dim = 32
heads = 2
ffn_dim = 32
patch = 2
reduced_channels = [8, 16]
"""


@pytest.fixture(scope="session")
def small(base, base_bundle, detector, words, tmp_path_factory):
    """Options of every command: three images a name, one a pair, heads of two steps."""
    config = tmp_path_factory.mktemp("small") / "head.toml"
    config.write_text(HEAD)
    model = ["--base", base, "--model", base_bundle, "--detector", detector, "--score", 0, "--threads", 1, "--lanes", 1]
    sizes = ["--steps", 3, "--batch", 4, "--per-name", 3, "--per-pair", 1, "--examples", 12, "--iterations", 2]
    return [*model, *words, *sizes, "--config", config]
