"""Output folders of synthetic runs."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.run_report import SETS, write_run

SCRIPT = "</script><script>document.title = 'broken'</script>"
NAME = f'a "quoted" <b>set</b> & ü{SCRIPT}'


def session(step: int = 0, total_steps: int = 40, **changes: Any) -> dict[str, Any]:
    """Return a row of `sessions.jsonl`."""
    data = [
        {"dataset": name, "file": f"{name}.jsonl", "records": 1000, "excluded": 2, "records_per_epoch": 998,
         "max_tiles": 6, "tokens": 900_000, "supervised_tokens": 50_000, "tiles": 4200, "longest": 4096,
         "with_fewer_tiles": 3, "truncated": 0}
        for name in SETS
    ]  # fmt: skip
    return {
        "step": step, "started": "2026-11-26T09:30:00+00:00", "total_steps": total_steps,
        "description": "InternVL3-8B, trained: LoRA of rank 16 in the language model",
        "parameters": 7_940_000_000, "trained_parameters": 37_700_000, "git": "0123abcd-dirty",
        "versions": {"python": "3.11.9", "m3llm": "0.1.0", "torch": "2.9.0"},
        "hardware": {"ranks": 2, "layout": "ddp", "device": "NVIDIA H100", "device_memory_gb": 85.0,
                     "cpu_cores": 32, "host_memory_gb": 200.0},
        "data": data, "validation_data": data[:1], **changes,
    }  # fmt: skip


def sample(step: int, answer: str, **changes: Any) -> dict[str, Any]:
    """Return a row of `samples.jsonl`."""
    return {
        "step": step, "dataset": "qa-bbox", "index": 3, "images": [],
        "question": "<image>\nWhere is panel A?", "reference": "top left", "answer": answer,
        "truncated": False, **changes,
    }  # fmt: skip


def write_lines(file: Path, *rows: Any) -> None:
    """Append rows to a JSON Lines file; strings are written as they are."""
    with file.open("a", encoding="utf-8") as stream:
        for row in rows:
            stream.write(row if isinstance(row, str) else json.dumps(row) + "\n")


def complete_run(folder: Path, steps: int = 40, **options: Any) -> Path:
    """Write all files of a finished run, with a hostile dataset name, and return its folder."""
    write_run(folder, steps, **{"sets": (*SETS[:3], NAME), **options})
    Image.new("RGB", (60, 40), "navy").save(folder / "figure.png")
    images = [str(folder / "figure.png"), "/nowhere/missing.png"]
    write_lines(folder / "sessions.jsonl", session(0, steps), session(steps // 2, steps))
    write_lines(
        folder / "samples.jsonl",
        sample(steps // 2, f"bottom {SCRIPT}", images=images, truncated=True),
        sample(steps, "Top left", images=images),
    )
    write_lines(
        folder / "ledger.jsonl",
        {
            "step": 0,
            "trained": [],
            "skipped": [{"dataset": NAME, "index": 7, "message": f"no image {SCRIPT}"}],
        },
    )
    (folder / "config.yaml").write_text("# flags\nlearning_rate: 5.0e-06\nuse_llm_lora: 16\nunknown: [1]\n")
    (folder / "train_results.json").write_text('{"step": 40}')
    (folder / "training_log.txt").write_text(
        f"09:30:01 INFO started\n09:30:02 WARNING step 3: skipped {SCRIPT}\n  detail\n"
        "09:30:03 WARNING step 4: skipped\n09:30:04 WARNING step 5: skipped\n"
    )
    return folder
