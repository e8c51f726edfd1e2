"""Continuous batching: answer prompts from many threads and coroutines in one batch."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch

from internvl_chat.data.encode.encoder import EncodedConversation
from internvl_chat.inference.decoding import Answer
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.inference.sampling import Sampling
from internvl_chat.inference.streaming import AnswerText
from internvl_chat.utils.errors import DataError, M3LLMError, ModelError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Default maximum number of tokens per answer.
MAX_NEW_TOKENS = 1024

FinishReason = Literal["stop", "length", "cancelled"]


class QueueFullError(M3LLMError):
    """Too many prompts are waiting."""


class SchedulerStoppedError(M3LLMError):
    """The scheduler has failed or was closed."""


class Completion:
    """Answer to a submitted prompt. Iterate over it once, with `for` or `async for`, for its text in pieces.

    The pieces contain complete characters, and joined they are the answer. If the prompt fails, the iteration
    ends with an exception.

    Attributes:
        encoded: token ids of the prompt and tile grids of its images.
        completion_tokens: number of tokens generated so far, without the end token.
        finish_reason: `stop` after the end token or a stop string, `length` after the maximum number of
            tokens, `cancelled` after `cancel`; None while decoding, and if the prompt has failed.
        cancelled: whether `cancel` was called, or the event loop of the consumer is closed.
    """

    def __init__(self, encoded: EncodedConversation) -> None:
        self.encoded = encoded
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.cancelled = False
        # Text, followed by the exception or None at the end.
        self._pieces: queue.SimpleQueue[str | M3LLMError | None] = queue.SimpleQueue()
        self._notify: Callable[[], object] | None = None

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt, including those of its images."""
        return len(self.encoded.input_ids)

    @property
    def image_tokens(self) -> int:
        """Number of tokens of the prompt that are replaced with vision features."""
        return len(self.encoded.image_positions)

    def cancel(self) -> None:
        """Stop generating; has no effect if the answer is complete. May be called from any thread."""
        self.cancelled = True

    def __iter__(self) -> Iterator[str]:
        """Yield the text in pieces; block until the next one arrives."""
        while isinstance(piece := self._pieces.get(), str):
            yield piece
        if piece is not None:
            raise piece

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yield the text in pieces without blocking the event loop."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._notify = lambda: loop.call_soon_threadsafe(arrived.set)
        while True:
            arrived.clear()
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                await arrived.wait()
                continue
            if not isinstance(piece, str):
                break
            yield piece
        if piece is not None:
            raise piece

    def _put(self, piece: str | M3LLMError | None) -> None:
        """Hand over a piece of text or the end of the answer; called by the scheduler's thread."""
        self._pieces.put(piece)
        if self._notify is not None:
            try:
                self._notify()
            except RuntimeError:  # the event loop of the consumer is closed
                self.cancelled = True

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._put(None)


@dataclass(eq=False)
class _Request:
    """A waiting prompt.

    Attributes:
        tiles: tiles of the images, (N, S, S, 3) uint8.
        embeddings: embeddings of the prompt, (T, C); None before it is the first in the queue.
    """

    completion: Completion
    text: AnswerText
    tiles: torch.Tensor
    max_new_tokens: int
    sampling: Sampling | None
    embeddings: torch.Tensor | None = None


class Scheduler:
    """Owns an engine and answers submitted prompts in one batch, first come, first served.

    A background thread runs the model. It adds a waiting prompt as soon as the batch has room for it, decodes
    one token of each answer per step, and hands the text to the prompt's `Completion`. Answers are the same
    as those of the engine. While the scheduler is open, nothing else may use the engine.

        with Scheduler(engine) as scheduler:
            completion = scheduler.submit(ask("What does panel A show?", [figure]))
            for piece in completion:
                print(piece, end="")

    Args:
        engine: the model.
        max_queue: maximum number of waiting prompts.

    Attributes:
        failure: description of the error that has stopped the scheduler; None without one.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 100) -> None:
        self.engine, self.max_queue = engine, max_queue
        self.failure: str | None = None
        self._closed = False
        self._changed = threading.Condition()  # guards _closed and _waiting
        self._waiting: deque[_Request] = deque()
        self._running: dict[Answer, tuple[Completion, AnswerText]] = {}
        self._decoder = engine.decoder()
        self._tokenizer_lock = threading.Lock()  # tokenizers are not thread-safe
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Return the scheduler."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the scheduler."""
        self.close()

    @property
    def waiting(self) -> int:
        """Number of prompts that wait for room in the batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of answers in progress."""
        return len(self._running)

    def submit(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Completion:
        """Encode a prompt and queue it. May be called from any thread; blocks while encoding.

        Args:
            prompt: the conversation.
            max_new_tokens: maximum number of tokens of the answer (default: `MAX_NEW_TOKENS`, or as many as
                the model supports after this prompt).
            sampling: sampling options; None for greedy decoding.
            stop: non-empty strings that end the answer (see `AnswerText`).

        Raises:
            DataError: the prompt or the answer is too long, or the numbers of placeholders and images differ.
            QueueFullError: too many prompts are waiting.
            SchedulerStoppedError: the scheduler has failed or was closed.
        """
        self.check_open()
        with self._tokenizer_lock:
            encoded = self.engine.encode(prompt)
            text = AnswerText(self.engine.tokenizer, stop)
        left = self.engine.max_length - len(encoded.input_ids)
        if max_new_tokens is None:
            max_new_tokens = min(MAX_NEW_TOKENS, left)
        if not 1 <= max_new_tokens <= left:
            raise DataError(
                f"the prompt has {len(encoded.input_ids)} tokens; an answer of {max_new_tokens} tokens does "
                f"not fit in the model's {self.engine.max_length} positions"
            )
        tiles = self.engine.encoder.tiles(prompt.images, encoded.grids)
        request = _Request(Completion(encoded), text, tiles, max_new_tokens, sampling)
        with self._changed:
            self.check_open()
            self._waiting.append(request)
            self._changed.notify()
        return request.completion

    def check_open(self) -> None:
        """Check that the scheduler accepts a prompt; `submit` does the same.

        Raises:
            QueueFullError: too many prompts are waiting.
            SchedulerStoppedError: the scheduler has failed or was closed.
        """
        if self.failure is not None or self._closed:
            raise self._stopped()
        if len(self._waiting) >= self.max_queue:
            raise QueueFullError(f"{self.max_queue} prompts are waiting already; try again later")

    def stop(self) -> None:
        """End the thread after the current step; unanswered prompts raise a `SchedulerStoppedError`."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread and wait until it has ended."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        """Answer prompts until the scheduler is closed or fails."""
        try:
            while self._wait():
                self._admit()
                self._step()
        except Exception as error:
            logger.exception("the model has failed; no more prompts are answered")
            self.failure = f"{type(error).__name__}: {error}"
        with self._changed:
            self._closed = True
            unfinished = [completion for completion, _ in self._running.values()]
            unfinished += [request.completion for request in self._waiting]
            self._waiting.clear()
            self._running.clear()
        self._decoder = self.engine.decoder()
        for completion in unfinished:
            completion._put(self._stopped())

    def _stopped(self) -> SchedulerStoppedError:
        if self.failure is None:
            return SchedulerStoppedError("the prompt was not answered: shutting down")
        return SchedulerStoppedError("the model has failed: see the log, and restart")

    def _wait(self) -> bool:
        """Block until there is something to do; return False if the scheduler was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _next_waiting(self) -> _Request | None:
        """Remove cancelled prompts from the queue and return the first of the others."""
        with self._changed:
            cancelled = [request for request in self._waiting if request.completion.cancelled]
            for request in cancelled:
                self._waiting.remove(request)
        for request in cancelled:
            request.completion._end("cancelled")
        return self._waiting[0] if self._waiting else None

    def _admit(self) -> None:
        """Add waiting prompts to the batch as long as it has room."""
        while request := self._next_waiting():
            answer = None
            try:
                answer = self._start(request)
            except torch.OutOfMemoryError as error:
                logger.warning("a prompt does not fit in memory: %s", error)
                request.completion._put(ModelError("not enough GPU memory for this prompt"))
            else:
                if answer is None:
                    return
                self._running[answer] = (request.completion, request.text)
            with self._changed:
                self._waiting.popleft()
            del request  # free its tensors before the end of the answer is reported
            if answer is not None:
                self._deliver(answer)

    def _step(self) -> None:
        """Decode one token of each answer."""
        for answer in self._decoder.step():
            self._deliver(answer)

    def _start(self, request: _Request) -> Answer | None:
        """Add a prompt to the batch and return its answer; None if the batch has no room for it."""
        if request.embeddings is None:
            request.embeddings = self.engine.embed_tiles(request.completion.encoded, request.tiles)
        return self._decoder.add(
            request.embeddings, max_new_tokens=request.max_new_tokens, sampling=request.sampling
        )

    def _deliver(self, answer: Answer) -> None:
        """Hand over the text of an answer's newest token; end the answer if it is complete."""
        completion, text = self._running[answer]
        piece, reason = "", answer.finish_reason
        with self._tokenizer_lock:
            if reason != "stop":
                piece = text.add(answer.ids[-1])
            if reason:
                piece += text.finish()
        completion.completion_tokens = len(answer.ids)
        if piece:
            completion._put(piece)
        if reason or text.stopped or completion.cancelled:
            del self._running[answer]
            if not reason:
                self._decoder.remove(answer)
            completion._end("stop" if text.stopped else reason or "cancelled")
