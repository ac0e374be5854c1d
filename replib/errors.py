"""The one kind of error that a user can cause and mend: shown as a single line, status 2."""


class UserError(ValueError):
    """A message that names the key or argument, its value, what is allowed and the remedy."""

    def __str__(self) -> str:
        """One line, whatever a file name or a value contains."""
        text = super().__str__()
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
