"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input: the message is one line naming the thing, what is wrong and what to do.

    The command lines print it without a traceback and exit with code 2.
    """
