"""The one exception whose text is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input. The message is one clear line that says what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 1; library users can catch it.
    """
