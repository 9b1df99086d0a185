"""The one way in which a command of `mesh` fails."""

__all__ = ("CommandError",)


class CommandError(Exception):
    """A command cannot go on; the message is one line that says what is wrong and what to do."""
