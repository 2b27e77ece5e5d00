"""Errors whose message is meant for the person who launched the run.

Entry points print the message without a traceback and exit with status 2; anything else is a bug and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in the configuration, the data or the run folder, explained in terms of the setting to change."""
