"""Configuration of the runs: flags, versions and hardware."""

import html
import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from internvl_chat.train.flag_help import flag_groups
from internvl_chat.train.report.run import Run, Session
from internvl_chat.utils.html import html_table


def configuration_block(run: Run) -> Markup:
    """Return the code, hardware, versions and flags of a run, and the times at which it was started."""
    facts = {"folder": str(run.folder.absolute())}
    if run.sessions:
        facts |= environment(run.sessions[-1])
    entries = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    parts = [f"<dl class='facts'>{''.join(entries)}</dl>"]
    if run.flags:
        defaults = _defaults()
        rows = [
            (f"--{name}", _text(value), _text(defaults[name]) if name in defaults else "unknown flag")
            for name, value in run.flags.items()
        ]
        parts.append(html_table(("flag", "value", "default"), rows))
        parts.append(f"<details><summary>All flags</summary>{_all_flags(run)}</details>")
    else:
        parts.append("<p class='empty'>No config.yaml.</p>")
    if len(run.sessions) > 1:
        starts = [
            (session.started, f"{session.step:,}", *list(environment(session).values())[:2])
            for session in run.sessions
        ]
        table = html_table(("started", "after step", "code", "devices"), starts)
        parts.append(f"<details><summary>{len(starts)} starts</summary>{table}</details>")
    return Markup("".join(parts))


def _all_flags(run: Run) -> str:
    parts = []
    for title, flags in flag_groups().items():
        rows = [(f"--{f.name}", _text(run.flags.get(f.name, f.default)), f.help) for f in flags]
        parts.append(f"<h3>{html.escape(title)}</h3>{html_table(('flag', 'value', 'meaning'), rows)}")
    return "".join(parts)


def differences_table(runs: Mapping[str, Run]) -> Markup:
    """Return the flags, code, hardware and versions that differ; the runs are keyed by name."""
    defaults = _defaults()
    names = dict.fromkeys([*defaults, *(name for run in runs.values() for name in run.flags)])
    rows = [
        (f"--{name}", *(_text(run.flags.get(name, defaults.get(name))) for run in runs.values()))
        for name in names
    ]
    environments = [environment(run.sessions[-1]) if run.sessions else {} for run in runs.values()]
    for fact in dict.fromkeys(fact for facts in environments for fact in facts):
        rows.append((fact, *(facts.get(fact, "unknown") for facts in environments)))
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return Markup(html_table(("setting", *runs), differing) if differing else "<p class='empty'>None.</p>")


def environment(session: Session) -> dict[str, str]:
    """Return the code, devices, host and versions of a session."""
    facts, versions = session.hardware, dict(session.versions)
    device = str(facts.get("device", "unknown device"))
    if memory := facts.get("device_memory_gb"):
        device += f" with {memory} GB"
    code = f"m3llm {versions.pop('m3llm', 'unknown')}" + (f", commit {session.git}" if session.git else "")
    return {
        "code": code,
        "devices": f"{facts.get('ranks', '?')} x {device} ({facts.get('layout', 'unknown layout')})",
        "host": f"{facts.get('cpu_cores', '?')} CPU cores, {facts.get('host_memory_gb', '?')} GB available",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _defaults() -> Mapping[str, Any]:
    return {flag.name: flag.default for flags in flag_groups().values() for flag in flags}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)
