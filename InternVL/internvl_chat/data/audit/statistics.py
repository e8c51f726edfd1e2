"""Audit statistics for the console and the report."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from internvl_chat.data.audit.checks import Audit, SetAudit
from internvl_chat.data.sources.problems import KINDS, LEAKS, WARNINGS, Problem
from internvl_chat.utils.text import counted

SET_HEADER = (
    "dataset", "records", "usable", "tiles", "tokens 5%", "50%", "95%", "max", "supervised", "errors",
    "warnings",
)  # fmt: skip


def set_statistics(findings: SetAudit, *, with_tokens: bool) -> dict[str, Any]:
    """Return the statistics of a dataset, keyed by name as in the JSON output.

    Args:
        findings: audit of the dataset.
        with_tokens: whether tokens were counted; otherwise, the token counts are None.
    """
    tokens, kinds = findings.lengths.tokens, findings.kinds
    percentiles: list[int | None] = [None] * 4
    if with_tokens and len(tokens):
        percentiles = [round(float(p)) for p in np.percentile(tokens, [5, 50, 95, 100])]
    return {
        "dataset": findings.spec.name,
        "file": str(findings.spec.annotation),
        "records": findings.records,
        "used": findings.used,
        "usable": findings.usable,
        "tiles": int(findings.lengths.tiles.sum()),
        "tokens": int(tokens.sum()) if with_tokens else None,
        "tokens_5": percentiles[0],
        "tokens_50": percentiles[1],
        "tokens_95": percentiles[2],
        "tokens_most": percentiles[3],
        "supervised": int(findings.lengths.supervised.sum()) if with_tokens else None,
        "errors": sum(count for kind, count in kinds.items() if kind not in WARNINGS),
        "warnings": sum(count for kind, count in kinds.items() if kind in WARNINGS),
        "problems": dict(sorted(kinds.items())),
    }


def set_rows(audit: Audit) -> list[tuple[Any, ...]]:
    """Return the table rows for `SET_HEADER`."""
    columns = (
        "dataset", "records", "usable", "tiles", "tokens_5", "tokens_50", "tokens_95", "tokens_most",
        "supervised", "errors", "warnings",
    )  # fmt: skip
    rows = []
    for findings in audit.sets:
        statistics = set_statistics(findings, with_tokens=audit.max_seq_length is not None)
        cells = [statistics[name] for name in columns]
        rows.append(tuple("-" if c is None else f"{c:,}" if isinstance(c, int) else c for c in cells))
    return rows


def group_by_kind(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """Group problems by kind: errors, then leaks, then warnings, each in the order of `KINDS`."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.kind, []).append(problem)
    order = [kind for kind in KINDS if kind not in WARNINGS] + list(WARNINGS)
    return {kind: groups[kind] for kind in order if kind in groups}


def severity(kind: str) -> str:
    """Return `error`, `warning` or `leak`."""
    return "warning" if kind in WARNINGS else "leak" if kind in LEAKS else "error"


def summary(audit: Audit, problems: Sequence[Problem]) -> str:
    """Summarize the findings in a few sentences."""
    used, usable = (sum(getattr(findings, name) for findings in audit.sets) for name in ("used", "usable"))
    counts = Counter(severity(problem.kind) for problem in problems)
    found = ", ".join(counted(counts[kind], kind) for kind in ("error", "warning", "leak"))
    return f"{usable:,} of {counted(used, 'record')} can be used; {found}. {describe_check(audit)}"


def describe_check(audit: Audit) -> str:
    """Describe how the records were checked."""
    images = "decoded" if audit.decoded else "opened, and decoded if the end of the file looks damaged"
    if audit.max_seq_length is None:
        return f"Images were {images}. Tokens were not counted: pass the model's tokenizer with --model."
    return f"Images were {images}. The limit is {audit.max_seq_length:,} tokens per record."
