"""The one error that users cause."""


class UserError(Exception):
    """Something that the user gave is wrong; the message is one line: what was given, what is allowed, what to do.

    The command line prints it and exits with status 2.
    """
