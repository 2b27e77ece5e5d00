"""Errors whose message is meant for the person who launched the run.

Entry points print the message without a traceback and exit with status 2; anything else is a bug and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in the configuration, the data or the run folder, explained in terms of the setting to change."""


class DataError(UserError, ValueError):
    """Training data that cannot be found, read or followed as configured."""


class RunFolderError(UserError):
    """The run folder (`MODEL_DIR`) belongs to another configuration, or cannot be used."""


class CheckpointError(UserError):
    """A checkpoint could not be found, written or read."""


class CheckpointMismatch(CheckpointError):
    """A whole checkpoint holds other arrays than this configuration expects."""


class CheckpointDamaged(CheckpointError):
    """Files of a checkpoint are missing, unreadable, or not as they were written."""


class CheckpointUnreadable(CheckpointError):
    """A checkpoint could not be read, and nothing shows whether its files or the program are at fault."""
