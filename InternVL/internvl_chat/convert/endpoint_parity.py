"""Compare token counts and greedy answers of an OpenAI-compatible endpoint with those of a checkpoint.

An endpoint reports only the total number of prompt tokens. The number of image tokens is this total minus the
number of text tokens, which is counted with the checkpoint's tokenizer and corrected by the difference that
was measured with a prompt without images.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from internvl_chat.convert.endpoint import Endpoint, as_parts
from internvl_chat.convert.parity_runners import Example
from internvl_chat.data.encode.conversation import render_message, token_ids
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tiling import plan_grid, tiles_per_image
from internvl_chat.data.sources.records import Message
from internvl_chat.inference.engine import Engine, Prompt
from internvl_chat.utils.errors import DataError, ModelError

_QUESTION = "Which panel shows the scan?"
# Tile limits that are tried to explain a difference.
_LIMITS = range(1, 41)
# Default system prompts of chat templates that ship with the language models.
_COMMON_SYSTEM_TEXTS = (
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful assistant.",
)


@dataclass(frozen=True)
class EndpointDifference:
    """Results of a checkpoint and an endpoint on one record; pairs are (checkpoint, endpoint).

    Attributes:
        prompt_tokens: number of tokens of the prompt; None if the endpoint does not report it.
        image_tokens: number of tokens of the images.
        sizes: (width, height) of each image.
        answers: greedy answers.
        error: why the endpoint rejected the record; None if it did not.
    """

    dataset: str
    index: int
    id: str | None
    prompt_tokens: tuple[int, int | None]
    image_tokens: tuple[int, int | None]
    sizes: tuple[tuple[int, int], ...]
    answers: tuple[str, str | None]
    error: str | None = None

    @property
    def same_prompt_tokens(self) -> bool:
        """Whether the prompts have the same number of tokens."""
        return self.prompt_tokens[0] == self.prompt_tokens[1]

    @property
    def same_image_tokens(self) -> bool:
        """Whether the images have the same number of tokens."""
        return self.image_tokens[0] == self.image_tokens[1]

    @property
    def same_answer(self) -> bool:
        """Whether the answers are identical."""
        return self.answers[0] == self.answers[1]


class EndpointComparison:
    """Compares an endpoint with a checkpoint.

    Args:
        engine: the checkpoint.
        endpoint: the endpoint.

    Attributes:
        offsets: number of tokens of a prompt without images at the endpoint, minus that of the checkpoint;
            without (False) and with (True) a system message. None if the endpoint does not report it.
    """

    def __init__(self, engine: Engine, endpoint: Endpoint) -> None:
        self.engine, self.endpoint = engine, endpoint
        self.preprocessing = engine.encoder.preprocessing
        self.offsets = {False: self._offset(), True: self._offset(Message("system", "Be brief."))}

    def _offset(self, *system: Message) -> int | None:
        prompt = Prompt((*system, Message("user", _QUESTION)))
        try:
            found = self.endpoint.answer(prompt, 1).prompt_tokens
        except DataError as problem:
            raise ModelError(f"{self.endpoint.url}: {problem}") from None
        return None if found is None else found - len(self.engine.encode(prompt).input_ids)

    def run(self, examples: Iterable[Example], max_new_tokens: int) -> Iterator[EndpointDifference]:
        """Yield the results on each example.

        Raises:
            DataError: an example cannot be encoded.
        """
        engine = self.engine
        for example in examples:
            engine.encoder = RecordEncoder(
                engine.tokenizer, self.preprocessing.with_tile_limit(example.max_tiles)
            )
            prompt = as_parts(example.prompt)
            try:
                encoded = engine.encode(prompt)
            except DataError as problem:
                raise DataError(f"{example.key}: {problem}", record=example.record.id) from None
            [answer] = engine.answer([prompt], max_new_tokens=max_new_tokens)
            tokens, images = len(encoded.input_ids), len(encoded.image_positions)
            found, found_images, text, error = None, None, None, None
            try:
                text, found = self.endpoint.answer(prompt, max_new_tokens)
            except DataError as problem:
                error = str(problem)
            offset = self.offsets[prompt.messages[0].role == "system"]
            if found is not None and offset is not None:
                found_images = found - offset - (tokens - images)
            yield EndpointDifference(
                *example.key,
                example.record.id,
                prompt_tokens=(tokens, found),
                image_tokens=(images, found_images),
                sizes=tuple(image.size for image in prompt.images),
                answers=(str(answer), text),
                error=error,
            )

    def faults(self, differences: Sequence[EndpointDifference], same_answers: float) -> list[str]:
        """Return a message for each difference, with its likely cause.

        Args:
            differences: results of `run`.
            same_answers: minimum fraction of identical answers.
        """
        problems = []
        rejected = [d for d in differences if d.error is not None]
        if rejected:
            problems.append(
                f"the endpoint rejects {len(rejected)} of {len(differences)} records, e.g. record "
                f"{rejected[0].index} of {rejected[0].dataset}: {rejected[0].error}"
            )
        answered = [d for d in differences if d.error is None]
        if any(offset is None for offset in self.offsets.values()):
            problems.append("the endpoint reports no usage.prompt_tokens, so token counts are not compared")
        else:
            problems += self._template_faults()
            problems += self._image_faults(answered)
        same = sum(d.same_answer for d in answered) / max(len(answered), 1)
        if same < same_answers:
            cause = "" if problems else "; the token counts agree, so compare weights, pixels and sampling"
            problems.append(
                f"{same:.0%} of the greedy answers are identical, less than {same_answers:.0%}{cause}"
            )
        return problems

    def _template_faults(self) -> list[str]:
        """Explain a different number of tokens of prompts without images."""
        default, given = self.offsets[False], self.offsets[True]
        assert default is not None and given is not None
        if given:
            return [f"the chat template differs: prompts have {_more(given)} than with the checkpoint"]
        if not default:
            return []
        system = self._system_tokens(self.preprocessing.system_text)
        if default == -system:
            cause = f"the endpoint adds no system prompt; the checkpoint's has {system} tokens"
        else:
            cause = (
                f"the endpoint has a different system prompt: it has {_more(default)} than the checkpoint's"
            )
            for text in _COMMON_SYSTEM_TEXTS:
                if default == self._system_tokens(text) - system:
                    cause = f"the endpoint's system prompt is {text!r}, not the checkpoint's"
        return [f"{cause}; use the exported chat template, or send the system prompt with each request"]

    def _system_tokens(self, text: str) -> int:
        [ids] = token_ids(self.engine.tokenizer, [render_message(Message("system", text))])
        return len(ids)

    def _image_faults(self, differences: Sequence[EndpointDifference]) -> list[str]:
        """Explain a different number of image tokens."""
        differing = [d for d in differences if not d.same_image_tokens]
        if not differing:
            return []
        first = differing[0]
        counts = f"{first.image_tokens[1]} instead of {first.image_tokens[0]}"
        problem = (
            f"the number of image tokens differs on {len(differing)} of {len(differences)} records, e.g. "
            f"{counts} on record {first.index} of {first.dataset}"
        )
        return [f"{problem}: {explain_tiles(differences, self.preprocessing)}"]


def _more(tokens: int) -> str:
    return f"{abs(tokens)} tokens {'more' if tokens > 0 else 'fewer'}"


def explain_tiles(differences: Sequence[EndpointDifference], preprocessing: Preprocessing) -> str:
    """Describe the tile settings that reproduce the image token counts of an endpoint.

    Args:
        differences: results on all records.
        preprocessing: options of the checkpoint.
    """
    own, thumbnail = preprocessing.max_dynamic_patch, preprocessing.use_thumbnail

    def matches(limit: Callable[[int], int], use_thumbnail: bool = thumbnail, per_image: int = 0) -> bool:
        """Return whether a tile limit, as a function of the number of images, explains all records."""
        return all(
            d.image_tokens[1]
            == per_image * len(d.sizes)
            + preprocessing.tokens_per_tile
            * sum(
                plan_grid(
                    *size,
                    min_tiles=preprocessing.min_dynamic_patch,
                    max_tiles=limit(len(d.sizes)),
                    tile_size=preprocessing.tile_size,
                    use_thumbnail=use_thumbnail,
                ).tiles
                for size in d.sizes
            )
            for d in differences
        )

    def shared(limit: int) -> Callable[[int], int]:
        return lambda images: tiles_per_image(limit, images)

    def each(limit: int) -> Callable[[int], int]:
        return lambda images: limit

    one_tile = preprocessing.tokens_per_tile
    if all((d.image_tokens[1] or 0) < one_tile * len(d.sizes) for d in differences if d.sizes):
        return "the endpoint ignores the images"
    if matches(each(own)):
        return f"each image may use all of max_dynamic_patch {own}, which a record's images should share"
    if matches(shared(own)):
        return "the endpoint does not reduce tiles to fit the checkpoint's max_seq_length"
    if matches(shared(own), use_thumbnail=not thumbnail):
        return f"the endpoint adds {'no' if thumbnail else 'a'} thumbnail to images of several tiles"
    for name, limited in (("record", shared), ("image", each)):
        for use_thumbnail in (thumbnail, not thumbnail):
            limits = [limit for limit in _LIMITS if matches(limited(limit), use_thumbnail)]
            if limits:
                span = f"{limits[0]}" if len(limits) == 1 else f"{limits[0]} to {limits[-1]}"
                also = (
                    "" if use_thumbnail == thumbnail else f" and {'a' if use_thumbnail else 'no'} thumbnail"
                )
                return f"they match max_dynamic_patch {span} per {name}{also}, not {own} per record"
    for tokens in (-3, -2, -1, 1, 2, 3):
        if matches(shared(own), per_image=tokens):
            return (
                f"the tiles match, but the text around each image has {_more(tokens)}: its template differs"
            )
    return "no tile limit explains them; compare tile size, tile limits, thumbnail and chat template"
