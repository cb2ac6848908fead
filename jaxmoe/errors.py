"""The one exception that means: the user can mend this, and the message says how."""


class UserError(ValueError):
    """A user's mistake. Entry points print it as one line and exit with code 2.

    The message names the offending value and the mend; it never needs a traceback.
    """
