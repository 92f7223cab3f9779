"""The exceptions users meet. Each message says what is wrong, where, and how to repair it."""

from collections.abc import Sequence


class GroundedDiffusionError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what a command ends with."""

    exit_code = 1


class UsageError(GroundedDiffusionError):
    """An option, prompt, file or directory named by the user cannot be used as given.

    Args:
        message: the line to show. It calls settings by their names in Python, such as min_area.
        fields: those of them that the message names; a command writes them as its options, such as --min-area. One
            whose name is a word of the message as well stands in backquotes.
    """

    exit_code = 2

    def __init__(self, message: str = "", *fields: str):
        super().__init__(message)
        self.fields = fields


class BadPrompts(UsageError):  # noqa: N818 - what they are
    """Several prompts cannot be used.

    Args:
        message: says how many; the first problem is added to it.
        problems: what is wrong with each, with its file and line; a command shows them all.
    """

    def __init__(self, message: str, problems: Sequence[UsageError]):
        super().__init__(f"{message}; the first is {problems[0]}")
        self.message, self.problems = message, problems

    def __reduce__(self):
        return BadPrompts, (self.message, self.problems)


class BundleError(GroundedDiffusionError):
    """A bundle is missing, damaged, incomplete or of a schema this version does not know."""

    exit_code = 2


class CheckpointError(GroundedDiffusionError):
    """A checkpoint cannot be read, lacks keys, or does not fit the model it is paired with."""

    exit_code = 2


class ParityError(GroundedDiffusionError):
    """An exported graph disagrees with the module it was made from by more than the tolerance."""


class BackendError(GroundedDiffusionError):
    """An inference backend is not installed, refuses a graph, or fails while running it."""


class NumericsError(GroundedDiffusionError):
    """A NaN or infinity appeared; the message names the stage, the step and the sample."""


class StorageError(GroundedDiffusionError):
    """A file of a run cannot be written or read where the output goes."""


class DiskFullError(StorageError):
    """The output's disk or quota is full; the same command goes on once there is room."""

    exit_code = 75


class Interrupted(GroundedDiffusionError):  # noqa: N818 - nothing went wrong
    """The run was asked to stop; the same command goes on."""

    exit_code = 75
