"""The demo with two small models that were trained on a few answers, so that the pages can be read."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from browser import served
from PIL import Image

from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.records import Message
from internvl_chat.data.sources.uploads import decode_uploads
from internvl_chat.data.synthetic.figures import Figure
from internvl_chat.inference.engine import Engine, Prompt, ask
from internvl_chat.inference.scheduler import Completion, Scheduler
from internvl_chat.inference.web.app import create_app
from internvl_chat.inference.web.examples import EXAMPLES, example_image

FOLLOW_UP = "Which panel shows a lesion?"


def example_images(number: int) -> list[Image.Image]:
    """Return the images of an example as the server decodes them."""
    files = [example_image(number, index) for index in range(EXAMPLES[number].num_images)]
    return decode_uploads(files, ImageOptions())


def example_prompt(number: int) -> Prompt:
    """Return the prompt of an example."""
    return ask(EXAMPLES[number].question, example_images(number))


def describe(figure: Figure) -> str:
    return "\n".join(f"({panel.label}) {panel.description}" for panel in figure.panels)


def teach(engine: Engine, answers: Sequence[tuple[Prompt, str]]) -> None:
    """Train an engine's model until it gives these answers."""
    model, encoder = engine.model, engine.encoder
    parameters = [*model.language_model.parameters(), *model.mlp1.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.0)
    batch = []
    for prompt, answer in answers:
        encoded = encoder.encode(
            [*prompt.messages, Message("assistant", answer)], [image.size for image in prompt.images]
        )
        with torch.no_grad():
            features = engine._features(encoder.tiles(prompt.images, encoded.grids))
        batch.append({
            "input_ids": encoded.input_ids[None], "labels": encoded.labels[None], "vision_features": features,
        })  # fmt: skip
    for _ in range(400):
        losses = [model(**record).token_losses for record in batch]
        if max(loss.max().item() for loss in losses) < 0.1:
            return
        sum(loss.mean() for loss in losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the model did not learn its answers: {[loss.mean().item() for loss in losses]}")


@dataclass
class Gate:
    """Lets the answers of a scheduler advance token by token.

    Attributes:
        open: whether answers run freely.
    """

    scheduler: Scheduler
    open: bool = True
    _steps: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        step = self.scheduler._decoder.step

        def wait() -> list:
            while not self.open and not self._steps.acquire(timeout=0.02):
                pass
            return step()

        self.scheduler._decoder.step = wait

    def release(self, tokens: int) -> None:
        """Let the answers advance by a number of tokens."""
        self._steps.release(tokens)


@contextlib.contextmanager
def closed(*gates: Gate) -> Iterator[None]:
    """Close gates, and open them at the end."""
    for gate in gates:
        gate.open = False
    try:
        yield
    finally:
        for gate in gates:
            gate.open = True
            gate._steps = threading.Semaphore(0)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


@pytest.fixture
def submitted(schedulers, monkeypatch) -> list[Completion]:
    """The answers of the first model that are submitted during a test."""
    completions: list[Completion] = []
    submit = schedulers[0].submit

    def recorded(*args, **options) -> Completion:
        completions.append(submit(*args, **options))
        return completions[-1]

    monkeypatch.setattr(schedulers[0], "submit", recorded)
    return completions


COMPOUND = describe(EXAMPLES[0].figure)
LESION = "Panel B, the head CT, shows a bright round lesion. Panel E, the ultrasound image, shows a cyst."
PANELS = ["Fig-1 and Fig-2 show MRI; Fig-0 shows CT.", "Fig-0 and Fig-1 show CT."]


@pytest.fixture(scope="package")
def engines(tiny_model) -> list[Engine]:
    """Two models that give different answers, the second one with fewer tiles."""
    first = Engine.from_checkpoint(tiny_model, device="cpu")
    second = Engine.from_checkpoint(tiny_model, device="cpu", max_dynamic_patch=6)
    compound, panels = example_prompt(0), example_prompt(1)
    teach(first, [(compound, COMPOUND), (compound.then(COMPOUND, FOLLOW_UP), LESION), (panels, PANELS[0])])
    teach(second, [(panels, PANELS[1])])
    return [first, second]


@pytest.fixture(scope="package")
def schedulers(engines) -> Iterator[list[Scheduler]]:
    with Scheduler(engines[0]) as first, Scheduler(engines[1]) as second:
        yield [first, second]


@pytest.fixture(scope="package")
def gates(schedulers) -> list[Gate]:
    return [Gate(scheduler) for scheduler in schedulers]


@pytest.fixture(scope="package")
def url(schedulers) -> Iterator[str]:
    """Address of the demo with one model."""
    with served(create_app({"checkpoint-400": schedulers[0]})) as address:
        yield address


@pytest.fixture(scope="package")
def compare_url(schedulers) -> Iterator[str]:
    """Address of the demo with two models."""
    names = ("checkpoint-400", "checkpoint-200")
    with served(create_app(dict(zip(names, schedulers, strict=True)))) as address:
        yield address
