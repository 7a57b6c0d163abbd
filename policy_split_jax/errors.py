"""The one exception that a user sees."""


class UserError(Exception):
    """Bad input or setting; its message is one line naming the file, line or key, and the remedy.

    The command line prints the message and exits with code 2, without a traceback.
    """
