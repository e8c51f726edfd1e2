"""Decode an answer to text token by token, in linear time."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from internvl_chat.data.encode.tokenizer import control_token_ids, decode_tokens

# Decoded text of a character whose last bytes have not been generated yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Bytes that may be missing from an incomplete character in UTF-8.
_MISSING_BYTES = 3


class AnswerText:
    """Text of an answer that grows token by token.

    The pieces returned by `add` and `finish` are never revised and contain only complete characters. Joined,
    they are the result of `decode_answer`, cut off before the first stop string. Stop strings are searched in
    the decoded text after leading whitespace; they may span tokens.

    Args:
        tokenizer: tokenizer of the model.
        stop: non-empty strings that end the answer.

    Attributes:
        stopped: whether a stop string was found; later tokens are ignored.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self._control = control_token_ids(tokenizer)
        # The newest tokens, and their text that has been decoded completely. The first tokens are context:
        # the text of a token may depend on the previous one.
        self._ids: list[int] = []
        self._decoded = 0
        self._started = False
        # Decoded text that cannot be returned yet: whitespace, or the beginning of a stop string.
        self._pending = ""

    def add(self, token: int) -> str:
        """Add a token and return the newly completed text, which may be empty."""
        if self.stopped or token in self._control:
            return ""
        self._ids.append(token)
        return self._extend(self._decode_new())

    def finish(self) -> str:
        """Return the rest of the text after the last token."""
        if self.stopped:
            return ""
        rest = self._extend(self._text(self._ids)[len(self._text(self._ids[: self._decoded])) :])
        if self.stopped:
            return rest
        pending, self._pending = self._pending.rstrip(), ""
        return rest + pending

    def _text(self, ids: Sequence[int]) -> str:
        return decode_tokens(self.tokenizer, ids)

    def _decode_new(self) -> str:
        """Return new text that ends with a complete character, or the empty string."""
        before, text = self._text(self._ids[: self._decoded]), self._text(self._ids)
        if not text.endswith(_INCOMPLETE):
            self._ids, self._decoded = self._ids[self._decoded :], len(self._ids) - self._decoded
            return text[len(before) :]
        # Invalid bytes stay replacement characters. They are final once enough bytes have followed.
        valid = self._text(self._ids[: self._decoded + 1])
        if text.startswith(valid) and len(text) >= len(valid) + _MISSING_BYTES:
            self._ids, self._decoded = self._ids[self._decoded :], 1
            return valid[len(before) :]
        return ""

    def _extend(self, new: str) -> str:
        """Append decoded text to the pending text and return the part that is final."""
        if not self._started:
            new = new.lstrip()
            self._started = bool(new)
        if not new:
            return ""
        self._pending += new
        found = [position for stop in self.stop if (position := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._pending[: min(found)].rstrip()
        end = len(self._pending) - max((_overlap(self._pending, stop) for stop in self.stop), default=0)
        final = self._pending[:end].rstrip()
        self._pending = self._pending[len(final) :]
        return final


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is the beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
