"""The one kind of error that a user can cause and mend: shown as a single line, status 2."""


class UserError(ValueError):
    """A message that names the key or argument, its value, what is allowed and the remedy."""
