"""Multiple choice: parse the selected option from a free-text answer, and compute macro averages.

Reasoning in `<think> … </think>` is ignored, even if it is cut off. A correction (a clause that starts with
"wait" or "actually" and then names an option) takes precedence. Otherwise, the rules below are tried in order
until one matches. If this rule matches more than one option, the answer is unparsable.

1. The answer is a letter, with any punctuation: `B`, `b.`, `(B)`, `**B**`.
2. The answer is the text of an option, with or without its letter.
3. The answer declares a letter: `the answer is B`, `Answer: (b)`, `\\boxed{B}`, `<answer>B</answer>`. The
   last declaration counts.
4. One or more lines start with the same letter: `B. text`, `(b) text`, `B, because …`.
5. The answer starts with the text of an option: `Yes, because …`.
6. The answer calls a letter correct or chosen, or concludes with a letter: `option B`, `I choose B`,
   `B is correct`, `Therefore, B.`.
7. The answer contains the text of exactly one option. If one option contains another, the longer one counts.
   The option texts A and I must be uppercase. A refusal ("no image was provided") does not select `No`.

Signs, comparison operators and prefixes are part of a word: `HER2-` is not `HER2+`, `<5` is not `>5`, and
`non-malignant` is not `malignant`. A letter always refers to the option with this letter, even if it is also
the text of a different option. `D. A` selects option D if A is the text of D (rule 2).

From rule 3 on, negated clauses (`not A`, `A is incorrect`) and letters after a noun (`panel B`,
`hepatitis B`) are ignored.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

_PUNCTUATION = r"[\s*_`\"'“”‘’()\[\]{}<>.,:;!$-]*"
_REASONING = re.compile(r"<think>.*?(?:</think>|\Z)|\A.*</think>", re.DOTALL | re.IGNORECASE)
_RETRACTION = re.compile(
    r"(?:^|[.!?,;\n—–-])[\s*_\"'(]*(?:(?:but|no|oh|hmm|so)\W+)?"
    r"(?:wait|actually|correction|on second thoughts?)\b(?=\s*[,:.;!?—–…-]|\s+(?:no|the|it|i)\b)",
    re.IGNORECASE,
)
_CLAUSE_ENDS = re.compile(
    r"[,;\n]|[.!?:](?=\s|$)|\b(?:because|since|but|so|therefore|thus|hence|while|although)\b|\band(?=\s+not\b)|"
    r"\b(?=rather than\b|instead of\b)",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|none|cannot|incorrect|wrong|false|unlikely|except|excluded?|ruled? out|"
    r"rather than|instead of)\b|n['’]t\b",
    re.IGNORECASE,
)
# A clause that rejects the letter or option before it.
_VERDICT = re.compile(
    r"\W*(?:(?:this|that|it)\s+)?(?:is\s+)?(?:incorrect|wrong|false|not\s+(?:correct|right|true))\W*",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"\b(?:incorrect|wrong|false|unlikely|excluded|ruled out)\b|"
    r"(?:\bnot|n['’]t|\bcannot be)\s+(?:\w+\s+){0,2}"
    r"(?:correct|right|true|likely|possible|supported|seen|shown|present|visible|answer|choice|option)\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[\s*_(\[-]*(?:option\s+)?([A-Z])[\s*_)\]]*[.:]\s*", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(?:cannot|can not|unable|impossible|insufficient|either way|do not know|"
    r"not (?:sure|certain|able|possible|enough|clear))\b|\b(?:can|don)['’]t\b",
    re.IGNORECASE,
)
# Words after a "no" that does not answer a question ("no image", "no doubt").
_EMPTY_NO = (
    r"(?:\w+\s+)?(?:images?|pictures?|figures?|photos?|ideas?|information|details?|context|data|access|answers?|"
    r"options?|doubts?|questions?|way|reason|longer|matter)\b"
)
# Words before and after an option text that deny it: "absence of carcinoma", "COVID-19 negative".
_DENIED_BEFORE = re.compile(
    r"\b(?:absence of|lack of|free of|free from|negative for|without)(?: an?| the| any)* $"
)
_DENIED_AFTER = re.compile(r" (?:(?:is|are|was|were) )?(?:negative|free|absent)\b")
_SUBJECT = re.compile(
    r"\W*(?:so\s+)?(?:i\s+(?:would\s+)?(?:choose|pick|select|go with|think|believe|say)\s+(?:that\s+)?)?"
    r"(?:(?:it|that|this)(?:['’]s|\s+(?:is|must be|should be|would be))\s+)?(?:an?\s+|the\s+)?(?:option\s+)?",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(r"\s+(?:is|seems)\s+(?:the\s+)?(?:correct|right|best|better)\b.*", re.IGNORECASE)
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–−", "-"))
_PREFIX = re.compile(
    r"\b(non|anti|pre|post|un|pseudo|sub|peri|para|extra|intra|inter|hyper|hypo|semi)"
    r"(?:-+|(?<=\bnon)\s+)(?=\w)"
)
_TAG = re.compile(r"</?[a-z]\w*>")
# A word or number with its sign or comparison operator.
_WORD = re.compile(
    r"(?:(?<![-=])[<>≤≥]\s*(?=[+-]?\d))?(?:(?<!\w)[+-](?=\d))?\w+(?:(?<=\d)[.,]\d+)*(?:[+-]+(?!\w))?"
)
# Words that show that the A or I before them is an option letter, not an article or a pronoun.
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
        last = _correction(text[retractions[-1].end() :].strip(" ,.:;!?—–…-\n"), choices)
        if last is not None:
            return last
    return _read(text, choices)


def _correction(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the option that a correction declares, or names in its first clause; or None."""
    letters = ascii_uppercase[: len(choices)]
    affirmed = _drop_negations(text, letters, choices).strip()
    end = _CLAUSE_ENDS.search(affirmed)
    clause = affirmed[: end.start()] if end else affirmed
    named = {_IS_RIGHT.sub("", clause), _IS_RIGHT.sub("", _SUBJECT.sub("", clause, count=1))}
    matches = set(_declared(affirmed, letters, choices)) or {
        letter
        for name in (text, *named)
        for rule in (_whole_letter, _whole_text)
        for letter in rule(name, letters, choices)
    }
    return _only(matches)


def _read(text: str, choices: Sequence[str]) -> str | None:
    """Apply the rules to an answer without its reasoning; return the letter of the option, or None."""
    letters = ascii_uppercase[: len(choices)]
    affirmed = _drop_negations(text, letters, choices)
    rules = (
        *((rule, text) for rule in (_exact_text, _whole_letter, _whole_text)),
        *((rule, affirmed) for rule in (_declared, _leading, _leading_text, _chosen)),
    )
    for rule, searched in rules:
        matches = set(rule(searched, letters, choices))
        if matches:
            return _only(matches)
    return _only(set(_contained(text, affirmed, letters, choices)))


def _only(matches: set[str]) -> str | None:
    """Return the only match; None if there are none or several."""
    return next(iter(matches)) if len(matches) == 1 else None


def _drop_negations(text: str, letters: str, choices: Sequence[str]) -> str:
    """Remove negated clauses, and the label before a clause that rejects it (`A. CT is incorrect.`)."""
    ends = [match.end() for match in _CLAUSE_ENDS.finditer(text)]
    clauses = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    kept = [""]
    for clause in clauses:
        if not _NEGATION.search(clause):
            kept.append(clause)
            continue
        label = _LABEL.fullmatch(kept[-1])
        if label and label[1].upper() in letters:
            if _rejects(clause, choices[letters.index(label[1].upper())]):
                kept.pop()
        elif kept[-1].rstrip().endswith(":") and _VERDICT.fullmatch(clause):
            kept.pop()
        kept.append("\n" * clause.endswith("\n"))
    return "".join(kept)


def _rejects(clause: str, choice: str) -> bool:
    """Return whether the negated clause after an option's label says that this option is wrong."""
    if _NEGATION.search(choice):
        return False
    names_option = f" {_plain(choice)} " in f" {_plain(clause)} "
    return bool(_VERDICT.fullmatch(clause) or (names_option and _REJECTED.search(clause)))


def _exact_text(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    """Return the options whose text is exactly the answer, such as `+`.

    A single letter is not looked up: it is the letter of an option (see `_whole_letter`).
    """
    whole = text.strip().lower()
    if len(whole) == 1 and whole.isalpha():
        return []
    return [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if unicodedata.normalize("NFKC", choice).strip().lower() == whole
    ]


def _whole_letter(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    match = re.fullmatch(rf"{_PUNCTUATION}([{letters}{letters.lower()}]){_PUNCTUATION}", text)
    return [match[1].upper()] if match else []


def _whole_text(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    plain = _plain(text)
    named = [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if _plain(choice) and plain in (_plain(choice), f"{letter.lower()} {_plain(choice)}")
    ]
    if named or plain != _without_signs(plain):
        return named
    # `5 cm` selects `>5 cm` if no other option reads 5 cm.
    return [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if plain and plain == _without_signs(_plain(choice))
    ]


# A lowercase letter must have brackets or punctuation, so that "the answer is a tumor" does not match.
_LETTER = (
    r"(?:\(\s*([{0}{1}])\s*\)|\[\s*([{0}{1}])\s*\]|([{0}])(?![\w'’]|[+-](?!\w))|"
    r"([{1}])(?=\s*(?:[.):}}<*\"]|$)))"
)
_SURE = (
    r"(?:\s*\b(?:to\s+be|most\s+likely|likely|probably|clearly|definitely|certainly|therefore|thus|indeed)"
    r"\b)*"
)
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
            named = _option_at(text[declaration.end() + match.start() :], letters, choices) or [
                _letter(match), *_joined(rest, letter),
            ]  # fmt: skip
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
            named += _option_at(line, letters, choices) or [
                _letter(match), *_joined(line[match.end() :], letter),
            ]  # fmt: skip
    return named


def _option_at(text: str, letters: str, choices: Sequence[str]) -> list[str]:
    """Return the option whose text begins here, if this text looks like a different letter (`B. cereus`)."""
    start = _plain(text[: max(map(len, choices)) * 2 + 20])
    return [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if re.match(r"[A-Z]\.?\s+\w", choice)
        and choice[0] != letter
        and f"{start} ".startswith(f"{_plain(choice)} ")
    ]


def _leading_text(text: str, letters: str, choices: Sequence[str]) -> Iterable[str]:
    first = _plain(re.split(r"[;:\n]|[,.](?!\d)", text, maxsplit=1)[0])
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
    """Return the options whose text occurs outside negated clauses.

    - An option that contains a negation may occur anywhere.
    - The option texts A and I (a blood group, a stage) must be uppercase and not an article or a pronoun.
    - `No` must not be part of a refusal.
    """
    contained = {}
    for letter, choice in zip(letters, choices, strict=True):
        words = _plain(choice)
        searched = text if _NEGATION.search(choice) else affirmed
        if words == "no":
            found = _says_no(text)
        elif len(words) == 1 and words.isalpha():
            found = _contains_letter(searched, words.upper())
        elif searched is text and re.search(r"(?i)\b(?:except|other than|apart from)\b", text):
            found = False
        else:
            found = bool(words) and _affirms(_plain(searched), words)
        if found:
            contained[letter] = f" {words} "
    return [
        letter
        for letter, choice in contained.items()
        if not any(choice in other and choice != other for other in contained.values())
    ]


def _affirms(plain: str, words: str) -> bool:
    """Return whether a plain text contains the words of an option without denying them."""
    plain, words = f" {plain} ", f" {words} "
    start = plain.find(words)
    while start >= 0:
        end = start + len(words) - 1
        denied = _DENIED_BEFORE.search(plain[max(0, start - 40) : start + 1])
        if not denied and not _DENIED_AFTER.match(plain[end : end + 40]):
            return words != " none " or not plain.startswith(" of ", end)
        start = plain.find(words, end)
    return False


def _says_no(text: str) -> bool:
    """Return whether a text contains the word "no" as an answer, alone or as in "there is no fracture"."""
    alone = re.compile(r"\W*\bno\s*(?:[^\w\s'’-]|$)", re.IGNORECASE)
    if any(alone.match(text, start) for start in [0, *(m.end() for m in _CLAUSE_ENDS.finditer(text))]):
        return True
    no = rf"(?i)(?<!\bor )(?<!\w-)\bno\b(?![-'’])(?!\s+{_EMPTY_NO})"
    return not _REFUSAL.search(text) and bool(re.search(no, text))


def _contains_letter(text: str, capital: str) -> bool:
    """Return whether a text contains a letter as a separate word.

    A and I must be uppercase and not an article or a pronoun.
    """
    case = "" if capital in "AI" else "(?i)"
    article = rf"(?!\s+(?!{_NO_NOUN})[a-z])" if capital in "AI" else ""
    return bool(re.search(rf"{case}(?<![\w'’]){capital}(?![\w'’]|[+-](?!\w)){article}", text))


def _letter(match: re.Match) -> str:
    return next(group for group in match.groups() if group).upper()


def _joined(rest: str, letter: str) -> list[str]:
    """Return a list with the letter that "and", "or", ",", "/", "&" or "+" joins to the previous letter."""
    match = re.match(rf"\W*(?:\b(?:and|or)\b|[,/&+])[\s*_\"']*(?:option\s+)?{letter}", rest)
    return [_letter(match)] if match else []


def _is_article(match: re.Match, text: str, end: int | None = None) -> bool:
    """Return whether a bare A or I is an article or a pronoun: "A benign lesion", but not "A because"."""
    end = match.end() if end is None else end
    return match[3] in ("A", "I") and bool(re.match(rf"\s+(?!{_NO_NOUN})[a-z]", text[end:]))


def _plain(text: str) -> str:
    """Lowercase a text and remove punctuation, except signs that belong to a word or number.

    >>> _plain("HER2- (≥ 2.5 cm), non-small cell"), _plain("ground-glass; -5")
    ('her2- ≥2.5 cm nonsmall cell', 'ground glass -5')
    """
    text = unicodedata.normalize("NFKC", text).translate(_DASHES).lower()
    text = _PREFIX.sub(r"\1", _TAG.sub(" ", text).replace("<=", "≤").replace(">=", "≥"))
    words = (match[0].replace(",", ".") for match in _WORD.finditer(text))
    return " ".join(re.sub(r"\s+", "", word) for word in words)


def _without_signs(plain: str) -> str:
    """Remove signs and comparison operators from a plain text."""
    return re.sub(r"[<>≤≥+-]", "", plain)


def split_choices(question: str) -> tuple[str, ...]:
    """Return the options that a question lists as `A. … B. …` (or `A)`, `A:`), or () if fewer than two.

    Each option starts on a new line, but the first may also follow a colon or a question mark. If there are
    no such options, they may start after any whitespace. The letters must be in order, so that "C. elegans"
    does not start an option.
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
