"""The one exception that means: the user can mend this, and the message says how."""

LONGEST = 3000  # characters of a message


class UserError(ValueError):
    """A user's mistake. Entry points print it as one line and exit with code 2.

    The message names the offending value and the mend; it never needs a traceback. What it quotes
    may come from anywhere, so it is kept to one line without control characters.
    """

    def __init__(self, message: object) -> None:
        words = " ".join(str(message).split("\n"))
        if len(words) > LONGEST:
            words = f"{words[: LONGEST - 500]} ... {words[-500:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in words))
