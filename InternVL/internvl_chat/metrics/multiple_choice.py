"""Multiple choice: parse the selected option from a free-text answer, and compute macro averages.

Reasoning in `<think> … </think>` is ignored, and text after "wait" or "actually" takes precedence. The first
matching rule decides; if it matches more than one option, the answer is unparsable:

1. The answer is a letter, with any punctuation: `B`, `b.`, `(B)`, `**B**`.
2. The answer is the text of an option, with or without its letter.
3. The answer declares a letter: `the answer is B`, `Answer: (b)`, `\\boxed{B}`, `<answer>B</answer>`. The
   last declaration counts.
4. One or more lines start with the same letter: `B. text`, `(b) text`, `B, because …`.
5. The answer starts with the text of an option: `Yes, because …`.
6. The answer calls a letter correct or chosen, or concludes with a letter: `option B`, `I choose B`,
   `B is correct`, `Therefore, B.`.
7. The answer contains the text of exactly one option. If one option contains another, the longer one counts.
   The option texts A and I must be uppercase.

A letter always refers to the option with this letter, even if it is also the text of a different option. Rule
2 parses `D. A` as option D if A is the text of D.

From rule 3 on, negated clauses (`not A`, `A is incorrect`) and letters after a noun (`panel B`,
`hepatitis B`) are ignored.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

_PUNCTUATION = r"[\s*_`\"'“”‘’()\[\]{}<>.,:;!$-]*"
_REASONING = re.compile(r"<think>.*?</think>|\A.*</think>", re.DOTALL | re.IGNORECASE)
_RETRACTION = re.compile(r"\b(?:wait|actually|correction|on second thoughts?)\b", re.IGNORECASE)
_CLAUSE_ENDS = re.compile(
    r"[,;\n]|[.!?:](?=\s|$)|\b(?:because|since|but|so|therefore|thus|hence|while|although)\b|\band(?=\s+not\b)",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|none|cannot|incorrect|wrong|false|unlikely|except|excluded?|ruled? out|"
    r"rather than|instead of)\b|n['’]t\b",
    re.IGNORECASE,
)
# Words after a capital A or I that show that it is an option letter, not an article or a pronoun.
_NO_NOUN = r"(?:and|as|because|but|for|from|given|in|is|or|since|which|with)\b"


def parse_choice(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the selected option, or None if no option or more than one is selected.

    Args:
        answer: free-text answer.
        choices: text of each option, at most 26.
    """
    if not choices:
        return None
    text = _REASONING.sub("", unicodedata.normalize("NFKC", answer)).strip()
    retractions = list(_RETRACTION.finditer(text))
    if retractions:
        last = _read(text[retractions[-1].end() :].strip(" ,.:;-\n"), choices)
        if last is not None:
            return last
    return _read(text, choices)


def _read(text: str, choices: Sequence[str]) -> str | None:
    """Apply the rules to an answer from which the reasoning was removed."""
    letters = ascii_uppercase[: len(choices)]
    for rule in (_whole_letter, _whole_text):
        matches = set(rule(text, letters, choices))
        if matches:
            return matches.pop() if len(matches) == 1 else None
    affirmed = _drop_negations(text)
    for rule in (_declared, _leading, _leading_text, _chosen):
        matches = set(rule(affirmed, letters, choices))
        if matches:
            return matches.pop() if len(matches) == 1 else None
    matches = set(_contained(text, affirmed, letters, choices))
    return matches.pop() if len(matches) == 1 else None


def _drop_negations(text: str) -> str:
    """Remove negated clauses."""
    ends = [match.end() for match in _CLAUSE_ENDS.finditer(text)]
    clauses = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return "".join("\n" * clause.endswith("\n") if _NEGATION.search(clause) else clause for clause in clauses)


def _whole_letter(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    match = re.fullmatch(rf"{_PUNCTUATION}([{letters}{letters.lower()}]){_PUNCTUATION}", text)
    return [match[1].upper()] if match else []


def _whole_text(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    plain = _plain(text)
    return [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if _plain(choice) and plain in (_plain(choice), f"{letter.lower()} {_plain(choice)}")
    ]


# A lowercase letter must have brackets or punctuation, so that "the answer is a tumor" does not match.
_LETTER = r"(?:\(\s*([{0}{1}])\s*\)|\[\s*([{0}{1}])\s*\]|([{0}])(?![\w'’])|([{1}])(?=\s*(?:[.):}}<*\"]|$)))"
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
    letter = _LETTER.format(letters, letters.lower())
    named: list[str] = []
    for declaration in _DECLARATION.finditer(text):
        match = re.match(letter, text[declaration.end() :])
        if match and not _is_article(match, text[declaration.end() :]):
            rest = text[declaration.end() + match.end() :]
            named = [_letter(match), *_joined(rest, letter)]
    return named


def _leading(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    letter = _LETTER.format(letters, letters.lower())
    any_case = f"[{letters}{letters.lower()}]"
    start = re.compile(
        rf"[\s*_`\"'#>-]*(?:\(\s*({any_case})\s*\)|({any_case})\s*(?:[.):](?=\D|$)|(?=\*|$))|"
        rf"([{letters}])(?:\s+[-–—]\s|,\s*(?=because|since|as\b|$)))"
    )
    named = []
    for line in text.splitlines():
        match = start.match(line)
        if match:
            named += [_letter(match), *_joined(line[match.end() :], letter)]
    return named


def _leading_text(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    first = _plain(re.split(r"[,.;:\n]", text, maxsplit=1)[0])
    return [
        letter for letter, choice in zip(letters, choices, strict=True) if first and _plain(choice) == first
    ]


def _chosen(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    letter = _LETTER.format(letters, letters.lower())
    before = (
        r"\b(?:options?|choices?|letter|choose|select|pick|go with|think|believe|say|it(?:'s| is)|that is)\s+"
    )
    named = []
    for match in re.finditer(rf"(?i:{before})(?:it\s+is\s+)?[*_\"']*{letter}[*_\"')]*", text):
        if not _is_article(match, text[match.start() :], match.end() - match.start()):
            named += [_letter(match), *_joined(text[match.end() :], letter)]
    # A noun must not precede these two patterns.
    connectives = "so|but|therefore|thus|hence"
    clause_start = rf"(?:^|[.;:,\n]|\b(?i:that|think|believe|only|{connectives})\b,?)\s*[*_\"'(]*"
    correct = r"[*_\"')]*\s+(?:is|seems|would be)\s+(?:the\s+)?(?:correct|right|best|most|true|answer|likely)"
    sentence_end = r"[*_\"')]*\s*(?=[.;\n]|$)"
    named += [match[1] for match in re.finditer(rf"{clause_start}([{letters}])(?={correct})", text)]
    sentence_start = rf"(?:^|[.;:\n]|\b(?i:{connectives})\b,?)\s*[*_\"'(]*"
    named += [match[1] for match in re.finditer(rf"{sentence_start}([{letters}]){sentence_end}", text)]
    return named


def _contained(text: str, affirmed: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    """Find option texts outside negated clauses; options that contain a negation match anywhere.

    The option texts A and I (a blood group, a stage) match only as uppercase words that are not an article or
    a pronoun.
    """
    contained = {}
    for letter, choice in zip(letters, choices, strict=True):
        words = f" {_plain(choice)} "
        searched = text if _NEGATION.search(choice) else affirmed
        found = words in f" {_plain(searched)} "
        if len(words) == 3 and words.strip().isalpha():
            found = _contains_letter(searched, words.strip().upper())
        if words.strip() and found:
            contained[letter] = words
    return [
        letter
        for letter, choice in contained.items()
        if not any(choice in other and choice != other for other in contained.values())
    ]


def _contains_letter(text: str, capital: str) -> bool:
    """Return whether a letter is a separate word; A and I must be uppercase and not article or pronoun."""
    case = "" if capital in "AI" else "(?i)"
    article = rf"(?!\s+(?!{_NO_NOUN})[a-z])" if capital in "AI" else ""
    return bool(re.search(rf"{case}(?<![\w'’]){capital}(?![\w'’]){article}", text))


def _letter(match: re.Match) -> str:
    return next(group for group in match.groups() if group).upper()


def _joined(rest: str, letter: str) -> list[str]:
    """Return the letter that follows another one after "and", "or", ",", "/", "&" or "+", as a list."""
    match = re.match(rf"\W*(?:\b(?:and|or)\b|[,/&+])[\s*_\"']*(?:option\s+)?{letter}", rest)
    return [_letter(match)] if match else []


def _is_article(match: re.Match, text: str, end: int | None = None) -> bool:
    """Return whether a bare A or I is an article or a pronoun: "A benign lesion", but not "A because"."""
    end = match.end() if end is None else end
    return match[3] in ("A", "I") and bool(re.match(rf"\s+(?!{_NO_NOUN})[a-z]", text[end:]))


def _plain(text: str) -> str:
    """Lowercase a text and remove punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def split_choices(question: str) -> tuple[str, ...]:
    """Return the options that a question lists as `A. … B. …` (or `A)`, `A:`), or () if fewer than two.

    Options start on a new line (the first may also follow a colon or a question mark) or else after any
    whitespace. The letters must be in order, so that "C. elegans" does not start an option.
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


def macro_averages(expected: Sequence[str], predicted: Sequence[str | None]) -> dict[str, float]:
    """Return macro-averaged `f1`, `precision` and `recall` over all expected and predicted letters.

    An unparsable answer counts as wrong, but is not a separate class.

    Args:
        expected: correct letters.
        predicted: letters of the answers; None if unparsable.
    """
    from sklearn.metrics import precision_recall_fscore_support

    letters = sorted({*expected, *filter(None, predicted)})
    precision, recall, f1, _ = precision_recall_fscore_support(
        expected, [letter or "" for letter in predicted], labels=letters, average="macro", zero_division=0
    )
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}
