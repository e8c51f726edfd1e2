"""Multiple choice: which option an answer names, and how often it is the right one.

Thoughts (`<think> … </think>`) are not read, and what follows "wait" or "actually" counts before the rest.
Then these rules are tried, the first that applies decides; where it names two options, none is taken:

1. the answer as a whole is a letter, in any ornament: `B`, `b.`, `(B)`, `**B**`;
2. it is the text of an option, with or without its letter;
3. it declares a letter: `the answer is B`, `Answer: (b)`, `\\boxed{B}`, `<answer>B</answer>`; the last one
   counts, so that thoughts may come before it;
4. its lines that begin with a letter begin with the same one: `B. text`, `(b) text`, `B` and then reasons;
5. it begins with the text of an option: `Yes, because …`;
6. it says that a letter is right or chosen, or concludes with one: `option B`, `I choose B`, `B is correct`,
   `Therefore, B.`;
7. it contains the text of one option alone (of options that contain one another, the longest).

From the third on, clauses that deny something (`not A`, `A is incorrect`) name nothing, and a letter behind a
noun (`panel B`, `hepatitis B`) is none.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

_ORNAMENTS = r"[\s*_`\"'“”‘’()\[\]{}<>.,:;!$-]*"
_THOUGHTS = re.compile(r"<think>.*?</think>|\A.*</think>", re.DOTALL | re.IGNORECASE)
_RETRACTION = re.compile(r"\b(?:wait|actually|correction|on second thoughts?)\b", re.IGNORECASE)
# Where one clause ends and another begins; what introduces a reason or a conclusion begins one, too.
_CLAUSE_ENDS = re.compile(
    r"[,;\n]|[.!?:](?=\s|$)|\b(?:because|since|but|so|therefore|thus|hence|while|although)\b|\band(?=\s+not\b)",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|no|never|neither|nor|none|cannot|incorrect|wrong|false|unlikely|except|excluded?|ruled? out|"
    r"rather than|instead of)\b|n['’]t\b",
    re.IGNORECASE,
)


def parse_choice(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer names, or None if it names none or several.

    Args:
        answer: what a model said.
        choices: the options' texts, 26 at most; the first has the letter A.
    """
    if not choices:
        return None
    text = _THOUGHTS.sub("", unicodedata.normalize("NFKC", answer)).strip()
    retractions = list(_RETRACTION.finditer(text))
    if retractions:
        last = _read(text[retractions[-1].end() :].strip(" ,.:;-\n"), choices)
        if last is not None:
            return last
    return _read(text, choices)


def _read(text: str, choices: Sequence[str]) -> str | None:
    """Apply the rules to a text without thoughts."""
    letters = ascii_uppercase[: len(choices)]
    for rule in (_whole_letter, _whole_text):
        found = set(rule(text, letters, choices))
        if found:
            return found.pop() if len(found) == 1 else None
    claimed = _without_denials(text)
    for rule in (_declared, _leading, _leading_text, _chosen):
        found = set(rule(claimed, letters, choices))
        if found:
            return found.pop() if len(found) == 1 else None
    found = set(_contained(text, claimed, letters, choices))
    return found.pop() if len(found) == 1 else None


def _without_denials(text: str) -> str:
    """Return a text without the clauses that deny something."""
    ends = [match.end() for match in _CLAUSE_ENDS.finditer(text)]
    clauses = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return "".join("\n" * clause.endswith("\n") if _DENIAL.search(clause) else clause for clause in clauses)


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
_LETTERS = r"(?:\(\s*([{0}{1}])\s*\)|\[\s*([{0}{1}])\s*\]|([{0}])(?![\w'’])|([{1}])(?=\s*(?:[.):}}<*\"]|$)))"
_SURE = r"(?:\s*\b(?:most\s+likely|likely|probably|clearly|definitely|certainly|therefore|thus|indeed)\b)*"
_DECLARATION = re.compile(
    rf"""(?:
        \b(?:answer|choice|option|letter|(?:correct|right|best)\s+one)\b[\s*_"]*
            (?:['’]s\b|\b(?:is|was|would\s+be|should\s+be|must\s+be|has\s+to\s+be)\b|[:=-]){_SURE}
        | \banswer\b (?=[\s*_"(]*[A-Z]\b)
        | 答案\s*(?:是|为|选|:)? | \\boxed\{{ | <answer>
    )
    [\s*_`"'$:]*(?:(?:the\s+)?(?:option|choice|letter)\b)?[\s*_`"':$]*(?:\\text\{{)?""",
    re.IGNORECASE | re.VERBOSE,
)


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
    any_case = f"[{letters}{letters.lower()}]"
    start = re.compile(
        rf"[\s*_`\"'#>-]*(?:\(\s*({any_case})\s*\)|({any_case})\s*(?:[.):](?=\D|$)|(?=\*|$))|"
        rf"([{letters}])(?:\s+[-–—]\s|,\s*(?=because|since|as\b|$)))"
    )
    found = []
    for line in text.splitlines():
        match = start.match(line)
        if match:
            found += [_letter(match), *_joined(line[match.end() :], one)]
    return found


def _leading_text(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    first = _plain(re.split(r"[,.;:\n]", text, maxsplit=1)[0])
    return [
        letter for letter, choice in zip(letters, choices, strict=True) if first and _plain(choice) == first
    ]


def _chosen(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    one = _LETTERS.format(letters, letters.lower())
    before = (
        r"\b(?:options?|choices?|letter|choose|select|pick|go with|think|believe|say|it(?:'s| is)|that is)\s+"
    )
    found = []
    for match in re.finditer(rf"(?i:{before})(?:it\s+is\s+)?[*_\"']*{one}[*_\"')]*", text):
        if not _is_article(match, text[match.start() :], match.end() - match.start()):
            found += [_letter(match), *_joined(text[match.end() :], one)]
    # Neither of these may stand behind a noun.
    free = r"(?:^|[.;:,\n]|\b(?i:that|think|believe|so|but|therefore|thus|hence|only)\b,?)\s*[*_\"'(]*"
    right = r"[*_\"')]*\s+(?:is|seems|would be)\s+(?:the\s+)?(?:correct|right|best|most|true|answer|likely)"
    concludes = r"[*_\"')]*\s*(?=[.;\n]|$)"
    found += [match[1] for match in re.finditer(rf"{free}([{letters}])(?={right})", text)]
    opens = r"(?:^|[.;:\n]|\b(?i:but|so|therefore|thus|hence)\b,?)\s*[*_\"'(]*"
    found += [match[1] for match in re.finditer(rf"{opens}([{letters}]){concludes}", text)]
    return found


def _contained(text: str, claimed: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    """Look for an option that denies something itself in the whole text, for any other in what is claimed."""
    said = {}
    for letter, choice in zip(letters, choices, strict=True):
        words = f" {_plain(choice)} "
        where = text if _DENIAL.search(choice) else claimed
        if words.strip() and words in f" {_plain(where)} ":
            said[letter] = words
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
