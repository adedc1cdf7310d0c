"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend; the message names what was found and what to change.

    `rlzoo.run` prints the message alone, without a stack trace, unless `debug=true`.
    """


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def check_at_least(key: str, value: float, low: float) -> None:
    if not value >= low:  # NaN is not either
        raise UserError(f"{key} must be at least {low}, got {value}.")


def check_acts(key: str, value: object, neutral: object, reason: str) -> None:
    """Raises a UserError if a value other than the neutral one was given where it cannot act."""
    if value != neutral:
        neutral = "null" if neutral is None else neutral
        raise UserError(f"{key}={value} would do nothing: {reason}. Set {key}={neutral}.")
