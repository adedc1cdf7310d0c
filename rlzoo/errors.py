"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend; the message names what was found and what to change.

    `rlzoo.run` prints the message alone, without a stack trace, unless `debug=true`.
    """
