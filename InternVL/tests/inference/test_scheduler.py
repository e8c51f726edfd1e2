"""One batch answers prompts from many threads and coroutines; a failure reaches only its own prompt."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import tensor_bytes
from inference.prompts import make_engine, mixed_prompts, picture

from internvl_chat.inference.engine import Engine, ask
from internvl_chat.inference.sampling import Sampling
from internvl_chat.inference.scheduler import Completion, QueueFullError, Scheduler, SchedulerStoppedError
from internvl_chat.utils.errors import DataError, ModelError

PROMPT = ask("Which panel shows the scan?")
LONG = 100


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(llm={"max_position_embeddings": 512})


@pytest.fixture
def scheduler(engine) -> Iterator[Scheduler]:
    with Scheduler(engine) as opened:
        yield opened


class Gate:
    """Blocks the scheduler's thread before it runs a prompt's vision tower."""

    def __init__(self, engine: Engine, monkeypatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        embed = engine.embed_tiles

        def wait(*args):
            self.reached.set()
            self.opened.wait()
            return embed(*args)

        monkeypatch.setattr(engine, "embed_tiles", wait)


@pytest.fixture
def gate(engine, monkeypatch) -> Iterator[Gate]:
    made = Gate(engine, monkeypatch)
    yield made
    made.opened.set()


def text(completion: Completion) -> str:
    return "".join(completion)


def varied_options(number: int) -> dict:
    sampling = Sampling(1.5, top_p=0.9, seed=number) if number % 3 == 0 else None
    return {"max_new_tokens": 1 + number % 12, "sampling": sampling}


def test_answers_from_many_threads_equal_those_of_the_engine(engine):
    prompts = mixed_prompts(50)
    expected = [engine.answer([p], **varied_options(i))[0] for i, p in enumerate(prompts)]

    def answer(number: int) -> tuple[str, Completion]:
        completion = scheduler.submit(prompts[number], **varied_options(number))
        return text(completion), completion

    with Scheduler(engine) as scheduler, ThreadPoolExecutor(50) as pool:
        found = list(pool.map(answer, range(50)))
    assert [answer for answer, _ in found] == expected
    for number, (_, completion) in enumerate(found):
        encoded = engine.encode(prompts[number])
        assert completion.finish_reason == "length"
        assert completion.completion_tokens == varied_options(number)["max_new_tokens"]
        assert completion.prompt_tokens == len(encoded.input_ids)
        assert completion.image_tokens == 4 * encoded.num_tiles


def test_answers_in_an_event_loop(engine, scheduler):
    prompts = mixed_prompts(12)

    async def answer(prompt) -> list[str]:
        return [piece async for piece in scheduler.submit(prompt, max_new_tokens=20)]

    async def answer_all() -> list[list[str]]:
        return await asyncio.gather(*map(answer, prompts))

    pieces = asyncio.run(answer_all())
    assert ["".join(of_answer) for of_answer in pieces] == engine.answer(prompts, max_new_tokens=20)
    assert max(map(len, pieces)) > 5


def test_the_event_loop_is_not_blocked(engine, scheduler, gate):
    async def answer() -> str:
        completion = scheduler.submit(PROMPT, max_new_tokens=4)
        asyncio.get_running_loop().call_soon(gate.opened.set)
        return "".join([piece async for piece in completion])

    assert asyncio.run(answer()) == engine.answer([PROMPT], max_new_tokens=4)[0]


def test_a_stop_string_ends_the_answer(engine, scheduler):
    answer = engine.answer([PROMPT], max_new_tokens=40)[0]
    stop = answer[12:15]
    completion = scheduler.submit(PROMPT, max_new_tokens=40, stop=["never", stop])
    assert text(completion) == answer[: answer.index(stop)].rstrip()
    assert completion.finish_reason == "stop"
    assert completion.completion_tokens < 40
    assert scheduler.running == 0


def test_the_end_token_ends_the_answer(engine):
    ids = engine.generate_ids([PROMPT], max_new_tokens=8)[0]
    ending = make_engine(llm={"max_position_embeddings": 512})
    ending.end_id = ids[4]
    with Scheduler(ending) as scheduler:
        completion = scheduler.submit(PROMPT, max_new_tokens=8)
        assert text(completion) == ending.answer([PROMPT], max_new_tokens=8)[0]
    assert (completion.finish_reason, completion.completion_tokens) == ("stop", ids.index(ids[4]))


def test_default_length():
    engine = make_engine(llm={"max_position_embeddings": 64})
    with Scheduler(engine) as scheduler:
        completion = scheduler.submit(PROMPT)
        text(completion)
    assert completion.completion_tokens == 64 - completion.prompt_tokens > 9


def test_cancelling(engine, scheduler, gate):
    running, waiting, other = (scheduler.submit(PROMPT, max_new_tokens=LONG) for _ in range(3))
    waiting.cancel()
    gate.opened.set()
    pieces = iter(running)
    next(pieces)
    running.cancel()
    list(pieces)
    assert running.finish_reason == "cancelled" and running.completion_tokens < LONG
    assert list(waiting) == [] and waiting.finish_reason == "cancelled"
    assert text(other) == engine.answer([PROMPT], max_new_tokens=LONG)[0]
    other.cancel()
    assert other.finish_reason == "length"


def test_the_queue_is_bounded(engine, gate):
    with Scheduler(engine, max_queue=3) as scheduler:
        queued = [scheduler.submit(PROMPT, max_new_tokens=2) for _ in range(3)]
        assert (scheduler.waiting, scheduler.running) == (3, 0)
        with pytest.raises(QueueFullError, match="3 prompts are waiting already"):
            scheduler.submit(PROMPT, max_new_tokens=2)
        gate.opened.set()
        for completion in queued:
            text(completion)
        assert text(scheduler.submit(PROMPT, max_new_tokens=2))


def test_an_unusable_prompt_fails_alone(engine, scheduler):
    with pytest.raises(DataError, match="1 <image> placeholder, but 0 images"):
        scheduler.submit(ask("Is <image>?"))
    with pytest.raises(DataError, match="max_seq_length 400"):
        scheduler.submit(ask("What is the arrow? " * 200))
    with pytest.raises(DataError, match="an answer of 600 tokens does not fit in the model's 512 positions"):
        scheduler.submit(PROMPT, max_new_tokens=600)
    assert text(scheduler.submit(PROMPT, max_new_tokens=4)) == engine.answer([PROMPT], max_new_tokens=4)[0]


def test_a_prompt_without_room_in_memory_fails_alone(engine, scheduler, monkeypatch):
    embed = engine.embed_tiles

    def fail(encoded, tiles):
        if len(tiles):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(encoded, tiles)

    monkeypatch.setattr(engine, "embed_tiles", fail)
    large = scheduler.submit(ask("Which?", [picture()]), max_new_tokens=4)
    small = scheduler.submit(PROMPT, max_new_tokens=4)
    with pytest.raises(ModelError, match="not enough GPU memory"):
        text(large)
    assert text(small) == engine.answer([PROMPT], max_new_tokens=4)[0]


def test_a_failure_of_the_model_reaches_all_prompts(engine, gate, monkeypatch):
    with Scheduler(engine) as scheduler:
        completions = [scheduler.submit(PROMPT, max_new_tokens=LONG) for _ in range(12)]
        monkeypatch.setattr(scheduler._decoder, "step", lambda: 1 / 0)
        gate.opened.set()
        for completion in completions:
            with pytest.raises(SchedulerStoppedError, match="the model has failed"):
                text(completion)
        assert scheduler.failure == "ZeroDivisionError: division by zero"
        with pytest.raises(SchedulerStoppedError, match="the model has failed"):
            scheduler.submit(PROMPT)
        assert (scheduler.waiting, scheduler.running) == (0, 0)


def test_closing(engine):
    scheduler = Scheduler(engine)
    completions = [scheduler.submit(PROMPT, max_new_tokens=LONG) for _ in range(12)]
    next(iter(completions[0]))
    scheduler.close()
    with pytest.raises(SchedulerStoppedError, match="shutting down"):
        text(completions[-1])
    with pytest.raises(SchedulerStoppedError, match="shutting down"):
        scheduler.submit(PROMPT)
    scheduler.close()


def test_a_consumer_whose_event_loop_is_closed(engine, scheduler):
    completion = scheduler.submit(PROMPT, max_new_tokens=LONG)

    async def leave() -> None:
        async for _ in completion:
            break

    asyncio.run(leave())
    assert text(scheduler.submit(PROMPT, max_new_tokens=4)) == engine.answer([PROMPT], max_new_tokens=4)[0]


def test_memory_is_released(engine, scheduler):
    image = picture(170, 60)

    def answer_many() -> int:
        completions = [
            scheduler.submit(ask(f"Which panel {i}?", [image] * (i % 3)), max_new_tokens=5) for i in range(20)
        ]
        for number, completion in enumerate(completions):
            if number % 4 == 0:
                completion.cancel()
            text(completion)
        text(scheduler.submit(ask("Which?", [image]), max_new_tokens=1))
        del completions, completion
        return tensor_bytes()

    before = answer_many()
    assert answer_many() == answer_many() == before
    assert scheduler._decoder._cache.tokens == 0
