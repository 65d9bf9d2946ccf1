"""The exceptions for mistakes that a user can correct."""


class UserError(ValueError):
    """Bad input: the message is one line naming the thing, what is wrong and what to do.

    The command lines print it without a traceback and exit with code 2.
    """


class SettingError(UserError):
    """A setting of QuantConfig that cannot work.

    The message names the field, for a Python caller; the command lines print `problem` after the
    field's flag instead.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        """problem: what is wrong and what to do; the message continues with it after the value."""
        # All arguments, so that the exception can be pickled.
        super().__init__(field, value, problem)
        self.field = field
        self.value = value
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field} {self.value} {self.problem}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 200 characters, to quote in a message.

    A line that ends in a colon goes on with the next one, which has the reason.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = lines.pop(0) if lines else type(error).__name__
    while text.endswith(":") and lines:
        text = f"{text} {lines.pop(0)}"
    return text[:200]
