"""Last step of quickstart.sh: compare the base model and both stages on the held-out records."""

import html
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from internvl_chat.commands.output import echo, print_table, progress
from internvl_chat.data.dataset import build_sets
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import load_meta
from internvl_chat.eval.exact_match import Answer, answer_records, compare_with_chance
from internvl_chat.eval.losses import losses
from internvl_chat.eval.report.comparison import ComparedRecord, comparison_page
from internvl_chat.inference.engine import Engine, last_question
from internvl_chat.train.checkpoint.run_folder import PLOT
from internvl_chat.utils.html import html_image, html_table

# Model folder -> column of the table.
MODELS = {"tiny": "base", "full": "full", "merged": "+ LoRA"}
TITLES = {
    "qa-puretext": "text only",
    "qa-bbox": "panel positions",
    "qa-single_subimage": "one panel",
    "qa-multiple_subimage": "multiple panels",
    "qa-subimage-option": "multiple choice",
    "qa-compound-image": "whole figure",
}
PAGE = "report.html"
MAX_LOSS_RATIO = 0.5
SIGNIFICANCE = 0.01
LEGEND = (
    "Loss: cross-entropy of the expected answers; lower is better.",
    "Accuracy: exact match on closed questions; chance is the expected accuracy of random guessing.",
    "The vision tower is random and frozen. It can distinguish types of images, but hardly positions.",
)
_MAX_NEW_TOKENS = 96
_SHOWN_PER_TASK = 4


@dataclass(frozen=True)
class Result:
    """Losses and answers of one model for the held-out records, in their order.

    Attributes:
        losses: (dataset, loss) of each record.
        answers: answer to each record.
    """

    losses: Sequence[tuple[str, float]]
    answers: Sequence[Answer]

    def loss(self, datasets: Sequence[str]) -> float:
        """Return the mean loss over the records of the given datasets."""
        values = [loss for dataset, loss in self.losses if dataset in datasets]
        return sum(values) / len(values)

    def of(self, datasets: Sequence[str]) -> list[Answer]:
        """Return the answers to the records of the given datasets."""
        return [answer for answer in self.answers if answer.dataset in datasets]


def evaluate(model: Path, meta: Path) -> tuple[Result, list[RecordSet]]:
    """Return the results of `m3llm loss` and `m3llm eval` for a model, and the datasets of the meta file."""
    engine = Engine.from_checkpoint(model)
    sets = build_sets(load_meta(meta, meta.parent), engine.encoder)
    count = sum(len(records.first(None)) for records in sets)
    of_records = losses(engine.model, sets, engine.encoder.preprocessing.normalize_type)
    answers = answer_records(engine, sets, max_new_tokens=_MAX_NEW_TOKENS, batch_size=32)
    result = Result(
        [(row.dataset, row.loss) for row in progress(of_records, total=count)],
        list(progress(answers, total=count)),
    )
    return result, sets


def table(results: Sequence[Result], withheld: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the result table, with one row per task and one for all tasks.

    Args:
        results: results of the models, in the order of `MODELS`.
        withheld: dataset that was withheld from the full-model stage.
    """
    base, *others = MODELS.values()
    header = ["held-out task", "records", f"loss: {base}", *others, "accuracy: chance", base, *others]
    rows = []
    for title, datasets in [*((title, [name]) for name, title in TITLES.items()), ("all", list(TITLES))]:
        tests = [compare_with_chance(result.of(datasets)) for result in results]
        rows.append(
            [
                f"{title} *" if datasets == [withheld] else title,
                str(len(results[0].of(datasets))),
                *(f"{result.loss(datasets):.2f}" for result in results),
                f"{tests[0].chance:.0%}" if tests[0] else "-",
                *(f"{test.correct / test.questions:.0%}" if test else "-" for test in tests),
            ]
        )
    return header, rows


def failures(results: Sequence[Result], withheld: str) -> Iterator[str]:
    """Yield a message for each goal that was missed.

    The goals are to halve the loss in each stage and to reach an accuracy above chance.
    """
    base, full, lora = results
    trained = [name for name in TITLES if name != withheld]
    for stage, before, after, datasets in (
        ("full-model", base, full, trained),
        ("LoRA", full, lora, [withheld]),
    ):
        first, last = before.loss(datasets), after.loss(datasets)
        if not last <= MAX_LOSS_RATIO * first:
            yield (
                f"{stage} stage: the held-out loss of its tasks changed from {first:.3f} to {last:.3f}, but "
                f"must fall to at most {MAX_LOSS_RATIO:.0%} of the first value"
            )
    test = compare_with_chance(lora.answers)
    if test is None or not test.p_value < SIGNIFICANCE:
        yield f"accuracy on closed questions after both stages: not above chance (p < {SIGNIFICANCE}): {test}"


def compared(results: Sequence[Result], sets: Sequence[RecordSet], withheld: str) -> Iterator[ComparedRecord]:
    """Yield the first records of each task with the answers of all models; start with the withheld task."""
    for records in sorted(sets, key=lambda records: records.spec.name != withheld):
        name = records.spec.name
        for index in records.first(_SHOWN_PER_TASK):
            record = records.record(index)
            prompt, reference = last_question(record, records.images(index, record))
            answers = [answer for result in results for answer in result.of([name]) if answer.index == index]
            yield ComparedRecord(
                TITLES[name] + (" (in the LoRA training data only)" if name == withheld else ""),
                prompt.messages[-1].content,
                prompt.images,
                reference,
                {
                    model: (answer.prediction, answer.correct)
                    for model, answer in zip(MODELS.values(), answers, strict=True)
                },
            )


def write_page(
    work: Path, results: Sequence[Result], sets: Sequence[RecordSet], withheld: str, note: str
) -> None:
    """Write the HTML page with the result table, some held-out questions with answers, and the loss plots."""
    introduction = [
        "<p>A small InternVL3 with random weights (base), trained on synthetic figures by the full-model "
        "launcher (full) and then by the LoRA launcher (+ LoRA). It is not a medical model.</p>",
        html_table(*table(results, withheld)),
        *(f"<p>{html.escape(text)}</p>" for text in (note, *LEGEND)),
        f"<p>Below are the first {_SHOWN_PER_TASK} held-out questions of each task, with greedy answers.</p>",
    ]
    plots = {run: (work / run / PLOT).read_bytes() for run in ("full", "lora")}
    end = [
        "<h2>Training loss</h2>",
        *(f"<div class='plot'>{html_image(plot, 'png', run)}</div>" for run, plot in plots.items()),
    ]
    records = compared(results, sets, withheld)
    page = comparison_page("M3LLM quickstart", introduction, records, end)
    (work / PAGE).write_text(page, encoding="utf-8")


def example_command(work: Path, sets: Sequence[RecordSet], withheld: str) -> str:
    """Return a shell command that asks the merged model the first question of the withheld task."""
    records = next(records for records in sets if records.spec.name == withheld)
    record = records.record(0)
    images = [word for path in records.image_paths(record) for word in ("--image", str(path))]
    model = ["--model", str(work / "merged")]
    return shlex.join(["m3llm", "generate", *model, *images, record.messages[0].content])


def main() -> int:
    """Compare the models in a quickstart folder; return 1 if a goal is missed (see `failures`).

    Command-line arguments: the folder, and the dataset that was withheld from the full-model stage.
    """
    work, withheld = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)  # more threads do not speed up such a small model
    meta = work / "data/held_out.json"
    results: list[Result] = []
    for folder in MODELS:
        echo(f"m3llm loss {meta} --model {work / folder}")
        echo(f"m3llm eval {meta} --model {work / folder}")
        result, sets = evaluate(work / folder, meta)
        results.append(result)
    note = f"* {TITLES[withheld]}: only in the LoRA training data, withheld from the full-model stage."
    write_page(work, results, sets, withheld, note)
    echo()
    print_table(*table(results, withheld))
    echo("\n".join([note, *LEGEND]))
    echo(f"\nAnswers with figures:\n  {work / PAGE}")
    echo(f"Ask a question:\n  source .venv/bin/activate\n  {example_command(work, sets, withheld)}")
    problems = list(failures(results, withheld))
    for problem in problems:
        echo(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
