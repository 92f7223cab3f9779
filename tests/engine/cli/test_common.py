"""What every command does with an error: one line, in its own options, and an exit status."""

import pickle

import pytest

from grounded_diffusion.engine.cli.common import in_flags, run_command
from grounded_diffusion.engine.cli.infer import FLAGS
from grounded_diffusion.errors import BackendError, Interrupted, UsageError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("min_area 0.5 is over max_area 0.4", "min_area", "max_area"),
         "--min-area 0.5 is over --max-area 0.4"),
        (UsageError("not among the 2 class names; add it to `names`", "names"),
         "not among the 2 class names; add it to --names"),
        (UsageError("no prompts; give `prompt_file` or `prompts`", "prompt_file", "prompts"),
         "no prompts; give --prompts FILE or --prompt TEXT"),
        (UsageError("shard_size and a shard", "shard"), "shard_size and a --shard"),
        (UsageError("a file that is called min_area"), "a file that is called min_area"),
        (BackendError("threads are short"), "threads are short"),
    ],
)  # fmt: skip
def test_fields_become_options(error, line):
    assert in_flags(error, FLAGS) == line
    again = pickle.loads(pickle.dumps(error))  # as Ray sends it
    assert in_flags(again, FLAGS) == line
    assert type(again) is type(error)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (UsageError("size must be even", "size"), 2, "gd-x: --size must be even\n"),
        (Interrupted("interrupted by SIGTERM"), 75, "gd-x: interrupted by SIGTERM\n"),
        (KeyboardInterrupt(), 130, "gd-x: what was finished is kept\n"),
    ],
)
def test_exit_status(capsys, raised, status, said):
    def body():
        if raised:
            raise raised

    assert run_command("gd-x", body, {}, interrupted="what was finished is kept") == status
    assert capsys.readouterr() == ("", said)
    assert run_command("gd-x", lambda: 3) == 3
