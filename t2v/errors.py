"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence.

    The message names the value, the limit, the likely cause and what to change. Commands print it without a traceback
    and exit with status 2.
    """
