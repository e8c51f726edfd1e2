"""Multiple choice: which option an answer names, and how often it is the right one.

An answer is read by these rules, the first that applies decides; where it names two options, none is taken:

1. the answer as a whole is a letter, in any ornament: `B`, `b.`, `(B)`, `**B**`;
2. it is the text of an option, with or without its letter;
3. it declares a letter: `the answer is B`, `Answer: (b)`, `\\boxed{B}`, `<answer>B</answer>`; the last one
   counts, so that thoughts may come before it;
4. its lines that begin with a letter begin with the same one: `B. text`, `(b) text`, `B` and then reasons;
5. it says that a letter is right or chosen: `option B`, `I choose B`, `B is correct`;
6. it contains the text of one option alone (of options that contain one another, the longest).
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

_ORNAMENTS = r"[\s*_`\"'“”‘’()\[\]{}<>.,:;!$-]*"


def parse_choice(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer names, or None if it names none or several.

    Args:
        answer: what a model said.
        choices: the options' texts, 26 at most; the first has the letter A.
    """
    if not choices:
        return None
    letters = ascii_uppercase[: len(choices)]
    text = unicodedata.normalize("NFKC", answer).strip()
    rules = (_whole_letter, _whole_text, _declared, _leading, _chosen, _contained)
    for rule in rules:
        found = set(rule(text, letters, choices))
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _whole_letter(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    match = re.fullmatch(rf"{_ORNAMENTS}([{letters}{letters.lower()}]){_ORNAMENTS}", text)
    return [match[1].upper()] if match else []


def _whole_text(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    plain = _plain(text)
    return [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if _plain(choice) and plain in (_plain(choice), f"{letter.lower()} {_plain(choice)}")
    ]


# A small letter counts where something marks it as an option, so that "the answer is a tumour" names none.
_DECLARATION = re.compile(
    r"(?:\b(?:answer|choice|option)\b[\s*_\"]*(?:\b(?:is|would be|should be)\b|[:=])|\\boxed\{|<answer>)"
    r"[\s*_`\"'$]*(?:(?:the\s+)?(?:option|choice|letter)\b)?[\s*_`\"':$]*(?:\\text\{)?",
    re.IGNORECASE,
)
_LETTERS = r"(?:\(\s*([{0}{1}])\s*\)|\[\s*([{0}{1}])\s*\]|([{0}])(?![\w'’])|([{1}])(?=\s*(?:[.):}}<*\"]|$)))"


def _declared(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    one = _LETTERS.format(letters, letters.lower())
    found: list[str] = []
    for declaration in _DECLARATION.finditer(text):
        match = re.match(one, text[declaration.end() :])
        if match and not _is_article(match, text[declaration.end() :]):
            rest = text[declaration.end() + match.end() :]
            found = [_letter(match), *_joined(rest, one)]
    return found


def _leading(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    one = _LETTERS.format(letters, letters.lower())
    start = re.compile(rf"[\s*_`\"'#>-]*(?:\(\s*([{letters}{letters.lower()}])\s*\)|"
                       rf"([{letters}{letters.lower()}])\s*(?:[.):](?=\D|$)|(?=\*|$)))")  # fmt: skip
    lines = [line for line in text.splitlines() if line.strip()]
    found = []
    for line in lines:
        match = start.match(line)
        if match:
            found += [_letter(match), *_joined(line[match.end() :], one)]
    return found


def _chosen(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    before = (
        r"\b(?:options?|choices?|letter|choose|select|pick|go with|think|believe|say|it(?:'s| is)|that is)\s+"
    )
    wrong = r"(?!\s*(?:is|are|was|seems|would be)\s*(?:not|n't|wrong|incorrect|false|unlikely))"
    after = r"(?=\s+(?:is|seems|would be)\s+(?:the\s+)?(?:correct|right|best|most|true|answer|likely))"
    one = _LETTERS.format(letters, letters.lower())
    found = []
    for match in re.finditer(rf"(?i:{before})(?:it\s+is\s+)?[*_\"']*{one}[*_\"')]*{wrong}", text):
        tail = text[match.end() :]
        if not _is_article(match, text[match.start() :], match.end() - match.start()):
            found += [_letter(match), *_joined(tail, one)]
    for match in re.finditer(rf"\b([{letters}])\b{after}", text):
        found.append(match[1])
    return found


def _contained(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    plain = f" {_plain(text)} "
    said = {
        letter: f" {_plain(choice)} "
        for letter, choice in zip(letters, choices, strict=True)
        if _plain(choice) and f" {_plain(choice)} " in plain
    }
    return [
        letter
        for letter, choice in said.items()
        if not any(choice in other and choice != other for other in said.values())
    ]


def _letter(match: re.Match) -> str:
    return next(group for group in match.groups() if group).upper()


def _joined(rest: str, one: str) -> list[str]:
    """Return the letter that "and", "or", "," or "/" adds to one already found."""
    more = re.match(rf"\W*(?:\b(?:and|or)\b|[,/&+])[\s*_\"']*(?:option\s+)?{one}", rest)
    return [_letter(more)] if more else []


def _is_article(match: re.Match, text: str, end: int | None = None) -> bool:
    """Say whether a bare A or I is a word of the sentence: "A benign lesion", but not "A because"."""
    end = match.end() if end is None else end
    joins = r"(?:and|as|because|but|for|from|given|in|is|or|since|which|with)\b"
    return match[3] in ("A", "I") and bool(re.match(rf"\s+(?!{joins})[a-z]", text[end:]))


def _plain(text: str) -> str:
    """Return a text's words in small letters, without punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def split_choices(question: str) -> tuple[str, ...]:
    """Return the options that a question lists as `A. … B. …` (or `A)`, `A:`), none without A and B.

    Each stands at the beginning of a line (the first may follow a colon or a question mark); failing that,
    anywhere behind white space. Letters must come in order, so that "C. elegans" in an option starts none.
    """
    for first, others in ((r"(?:^|\n|[:?])[ \t]*", r"\n[ \t]*"), (r"(?<!\S)", r"(?<!\S)")):
        marks: list[re.Match] = []
        for letter in ascii_uppercase:
            pattern = re.compile(rf"{others if marks else first}\(?{letter}[.):]")
            match = pattern.search(question, marks[-1].end() if marks else 0)
            if match is None:
                break
            marks.append(match)
        if len(marks) > 1:
            ends = [mark.start() for mark in marks[1:]] + [len(question)]
            return tuple(question[m.end() : end].strip() for m, end in zip(marks, ends, strict=True))
    return ()


def macro_averages(expected: Sequence[str], found: Sequence[str | None]) -> dict[str, float]:
    """Return `f1`, `precision` and `recall`, averaged over the letters, by scikit-learn.

    The letters are all that are right or were answered; an answer that names none is a miss of the right
    letter, and no letter of its own.

    Args:
        expected: the right letters.
        found: what was answered, None where no letter could be read.
    """
    from sklearn.metrics import precision_recall_fscore_support

    letters = sorted({*expected, *filter(None, found)})
    precision, recall, f1, _ = precision_recall_fscore_support(
        expected, [letter or "" for letter in found], labels=letters, average="macro", zero_division=0
    )
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}
