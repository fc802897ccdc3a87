"""One request on its way from prompt to answer, a token at a time.

Knows what was computed and what is next, and turns scores into text. Knows neither threads nor
other requests nor where scores come from.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from outcrop.errors import ModelErrorException
from outcrop.models.tokenizer import IncrementalDecoder, Tokenizer
from outcrop.serve.backend import Scores
from outcrop.serve.request import FinishReason, Generation, SamplingParams, TokenEvent, TokenLogprob
from outcrop.serve.sampler import Draw, logprobs, new_draw, new_generator
from outcrop.serve.stop import StopScanner


class TokenSequence:
    """The state of one request."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        end_token_ids: Sequence[int],
        tokenizer: Tokenizer,
        shown: Sequence[str] = (),
    ) -> None:
        """
        Args:
            shown: control tokens that the text shows.
        """
        self.input_tokens = len(prompt_ids)
        self.max_tokens = max_tokens
        self.ids = list(prompt_ids)
        """The prompt and what was drawn after it."""
        self.num_computed = 0
        """Of `ids`, from the first on. The answer goes on when all are."""
        self._sampling = sampling
        self._end_token_ids = frozenset(end_token_ids)
        self._generator = new_generator(sampling.seed)
        self._draw: Draw | None = None
        self._tokenizer = tokenizer
        ids = [tokenizer.token_id(token) for token in shown if token in tokenizer.special_tokens]
        self._decoder = IncrementalDecoder(tokenizer, [id for id in ids if id is not None])
        self._scanner = StopScanner(sampling.stop)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self.output_tokens = 0

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether all scores of the prompt are wanted, so that none of it can be taken over."""
        return self._sampling.prompt_logprobs

    def next_draw(self) -> Draw | None:
        """Return how the next token is drawn: the same again until it is accepted."""
        if self._draw is None:
            self._draw = new_draw(self._sampling, self._generator)
        return self._draw

    def read_prompt(self, scores: Scores, first: int) -> None:
        """Take the scores of a part of the prompt, in the order of its parts.

        Args:
            first: place of the part's first token.
        """
        if first == 0:
            self._prompt_logprobs = [TokenLogprob(self._tokenizer.decode(self.ids[:1]), None)]
        following = self.ids[first + 1 : min(first + 1 + len(scores.chosen), self.input_tokens)]
        self._prompt_logprobs += self._told(scores.logits_NV[: len(following)], following)

    def accept(self, scores: Scores) -> TokenEvent | Generation | None:
        """Draw the next token; returns released text, the finished answer, or None for neither.

        Raises:
            ModelErrorException: the model's scores are not numbers.
        """
        token = scores.chosen[-1]
        if token < 0:
            raise ModelErrorException(
                "The model's scores are not finite numbers, so no token can be drawn."
            )
        self._draw = None
        self.output_tokens += 1
        if token in self._end_token_ids:
            return self._finish("stop", self._decoder.finish())
        if self._sampling.logprobs:
            self._logprobs += self._told(scores.logits_NV[-1:], [token])
        self.ids.append(token)
        text = self._decoder.push([token])
        if self.output_tokens >= self.max_tokens:
            return self._finish("length", text + self._decoder.finish())
        released, found = self._scanner.add(text)
        self._text.append(released)
        if found is not None:
            return self._generation("stop_sequence", found)
        if not released:
            return None
        return TokenEvent(released, self.input_tokens, self.output_tokens)

    def _finish(self, reason: FinishReason, text: str) -> Generation:
        released, found = self._scanner.add(text)
        self._text.append(released)
        if found is not None:
            return self._generation("stop_sequence", found)
        self._text.append(self._scanner.finish())
        return self._generation(reason, None)

    def _generation(self, reason: FinishReason, found: str | None) -> Generation:
        return Generation(
            text="".join(self._text),
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            finish_reason=reason,
            stop_sequence=found,
            logprobs=tuple(self._logprobs) if self._sampling.logprobs else None,
            prompt_logprobs=tuple(self._prompt_logprobs) if self.wants_prompt_scores else None,
        )

    def _told(self, logits_NV: Tensor, tokens: Sequence[int]) -> list[TokenLogprob]:
        if not tokens:
            return []
        decode, top = self._tokenizer.decode, self._sampling.top_logprobs
        return [
            TokenLogprob(decode([token]), own, tuple((decode([other]), of) for other, of in best))
            for token, (own, best) in zip(tokens, logprobs(logits_NV, tokens, top), strict=True)
        ]
