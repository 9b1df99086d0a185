"""The one way in which a command of `mesh` fails."""

from shared.command_line import CommandFailed

__all__ = ("CommandError",)


class CommandError(CommandFailed):
    """A command cannot go on; the message is one line that says what is wrong and what to do."""
