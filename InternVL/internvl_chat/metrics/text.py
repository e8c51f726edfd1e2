"""How texts are cut into words for BLEU and CIDEr, as for the published figures."""


def words(text: str) -> list[str]:
    """Return the words of a text: lower-cased, every full stop set apart, split at white space.

    >>> words("The MRI shows 3.5 mm.")
    ['the', 'mri', 'shows', '3', '.5', 'mm', '.']
    """
    return text.lower().replace(".", " .").split()
