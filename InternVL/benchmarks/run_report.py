"""Run report of a long run: time to write it, its size, and the time until a browser shows the first chart.

The logs of a synthetic run are written to a temporary folder. The browser is headless Chromium, driven by
Playwright; if one of them is missing, only the time to write is measured.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common import write_report as write_results
from internvl_chat.train.report.page import write_report

SETS = ("qa-puretext", "qa-bbox", "qa-single_subimage", "qa-multiple_subimage", "qa-subimage-option",
        "qa-compound-image")  # fmt: skip
_RECORDS = 16
_VALIDATIONS = 50


def write_run(
    folder: Path, steps: int, *, seed: int = 0, sets: Sequence[str] = SETS, level: float = 1.0
) -> None:
    """Write `metrics.jsonl`, `ledger.jsonl` and `validation.jsonl` of a synthetic run.

    Args:
        folder: output folder; created if needed.
        steps: number of steps.
        seed: seed of the noise.
        sets: names of the datasets.
        level: loss at which the curves end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    rows, ledger, validations = [], [], []
    offsets = dict(zip(sets, random.uniform(-0.3, 0.3, len(sets)), strict=True))
    for step in range(1, steps + 1):
        done = step / steps
        trend = level * (1 + 1.5 * math.exp(-8 * done))
        chosen = random.choice(len(sets), _RECORDS)
        parts = {
            name: {
                "records": int(count),
                "loss": round(
                    max(trend + offsets[name] + random.normal(0, 0.25) / math.sqrt(count), 0.01), 7
                ),
            }
            for name, count in ((sets[i], (chosen == i).sum()) for i in np.unique(chosen))
        }
        loss = sum(part["records"] * part["loss"] for part in parts.values()) / _RECORDS
        seconds = 1.9 * random.lognormal(0, 0.08)
        rows.append(_metrics_row(step, steps, loss, seconds, parts, random))
        trained = [[sets[i], int(random.integers(40_000))] for i in chosen]
        ledger.append({"step": step, "epoch": 0, "trained": trained})
        if step % max(1, steps // _VALIDATIONS) == 0:
            validations.append(_validation_row(step, steps, trend, offsets))
    for name, lines in (("metrics", rows), ("ledger", ledger), ("validation", validations)):
        text = "".join(f"{json.dumps(row)}\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _metrics_row(
    step: int, steps: int, loss: float, seconds: float, parts: dict[str, Any], random: np.random.Generator
) -> dict[str, Any]:
    tokens = int(random.normal(21_000, 1500))
    warmup = min(1.0, step / (0.03 * steps))
    return {
        "step": step,
        "epoch": round(step / steps, 6),
        "loss": round(loss, 7),
        "grad_norm": round(float(0.4 + loss * random.lognormal(-0.5, 0.3)), 7),
        "learning_rate": 5e-6 * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
        "records": _RECORDS,
        "tokens": tokens,
        "supervised_tokens": tokens // 12,
        "tiles": int(random.integers(30, 70)),
        "seconds": round(seconds, 4),
        "pause_seconds": 0.002,
        "records_per_second": round(_RECORDS / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "mfu": round(0.9 / seconds, 4),
        "max_memory_gb": round(58 + 6 * min(1.0, 10 * step / steps), 3),
        "sets": parts,
    }


def _validation_row(step: int, steps: int, trend: float, offsets: dict[str, float]) -> dict[str, Any]:
    def scores(loss: float, records: int) -> dict[str, Any]:
        return {"records": records, "tokens": 90 * records, "loss": round(loss, 5), "em": 60 - 20 * loss,
                "rougeL": 70 - 18 * loss, "generated": 8, "truncated": 0}  # fmt: skip

    sets = {name: scores(trend + 0.05 + offset, 200) for name, offset in offsets.items()}
    overall = scores(trend + 0.05 + sum(offsets.values()) / len(offsets), 200 * len(offsets))
    return {"step": step, "epoch": step / steps, "seconds": 40.0, **overall, "sets": sets}


def seconds_to_first_chart(page: Path, executable: str) -> float:
    """Return the seconds from the navigation to a page until its first chart is drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.goto(page.as_uri(), wait_until="commit")
        drawn = opened.locator(".canvas[data-drawn]").first.get_attribute("data-drawn")
        browser.close()
    return int(drawn or 0) / 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the run (default: 100000)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements (default: 3)")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="m3llm-report-") as name:
        run = Path(name) / "run"
        write_run(run, args.steps)
        results: dict[str, Any] = {"steps": args.steps, "metrics_mb": _megabytes(run / "metrics.jsonl")}
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            write_report([run], run / "report.html")
            seconds.append(round(time.perf_counter() - start, 2))
        results |= {"write_seconds": seconds, "report_mb": _megabytes(run / "report.html")}
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if find_spec("playwright") and chromium:
            page = run / "report.html"
            results["first_chart_seconds"] = [
                seconds_to_first_chart(page, chromium) for _ in range(args.repeats)
            ]
    print(json.dumps(results, indent=2))
    if args.json:
        write_results(args.json, **results)
    return 0


def _megabytes(file: Path) -> float:
    return round(file.stat().st_size / 1e6, 2)


if __name__ == "__main__":
    sys.exit(main())
