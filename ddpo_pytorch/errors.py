"""The one exception a user should ever read."""


class UserError(Exception):
    """Something in the command, the configuration or a file is not usable.

    The message is one line: what was given, what is allowed, and what to do. Scripts turn it into that line on standard
    error and exit code 2 (`ddpo_pytorch.run.cli`); everything else keeps its traceback, because it is a defect.
    """
