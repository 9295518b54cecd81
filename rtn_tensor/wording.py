"""Words of messages."""


def with_article(name: str) -> str:
    """The name of a class with its article, as it is spoken: a str, an int, an Embedding, an RTNConfig."""
    vowel = name[:1] in "AEIOaeio" or name[:2] in ("Un", "un")
    letter_by_letter = name[:1] in "FHLMNRSX" and name[1:2].isupper()
    return f"{'an' if vowel or letter_by_letter else 'a'} {name}"
