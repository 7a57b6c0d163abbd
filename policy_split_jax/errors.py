"""The one exception that a user sees, and which of the system's may pass."""

import errno

PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN}
"""Numbers of an `OSError` that may be gone at the next try, which the launchers make after any exit code but 2."""


class UserError(Exception):
    """Bad input or setting; its message is one line naming the file, line or key, and the remedy.

    The command line prints the message and exits with code 2, without a traceback.
    """
