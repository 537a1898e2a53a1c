"""The default name of a new run: that of the old one, and what was done to it."""


def suffix(*words: str | None) -> str:
    """Joins words with hyphens and leaves out empty ones and characters that would have to be quoted in a shell."""
    return "-".join(word for word in words if word).replace(":", "").replace(",", "-")
