"""The class family of errors that a user can cause; each ends a command in one line and an exit code.

The root lives here because data is the lowest package that raises one; trainer/errors.py adds the others.
"""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do; `exit_code` is documented."""

    exit_code = 1


class DataError(UserError):
    """A corpus, tokenizer or dataset that cannot be used."""

    exit_code = 3
