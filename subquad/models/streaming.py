"""Generation that never ends: memory and time per token stay what they are, however long the stream has become.

`generate` keeps all tokens and joins each new one to them; here nothing is kept but the states of the mixers, the last
token and the random generator. So only mixers whose state stops growing will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from subquad.capability import mixers_with
from subquad.models.block import layers_of
from subquad.models.cache import SubquadCache
from subquad.models.causal_lm import SubquadForCausalLM
from subquad.models.embedding import check_tokens
from subquad.models.sampling import Sampling, choose
from subquad.models.state_tensors import state_tensors, states_of_tensors


@dataclass(frozen=True)
class StreamSnapshot:
    """A moment of a stream.

    Attributes:
        cache: the states after all tokens but the last.
        last: int64 (B, 1), the last token, which is read next.
        generator_state: uint8, of the random generator.
    """

    cache: SubquadCache
    last: Tensor
    generator_state: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, which `safetensors.torch.save_file` can write."""
        return {
            "tokens": torch.tensor(self.cache.get_seq_length()),
            "last": self.last.clone(),
            "generator_state": self.generator_state.clone(),
            **state_tensors(self.cache.states),
        }

    @classmethod
    def from_tensors(cls, model: SubquadForCausalLM, tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of `tensors`, on the device of the model.

        Raises:
            ValueError: tensors that are missing, or states of another model.
        """
        states = dict(tensors)
        try:
            tokens, last, generator_state = (states.pop(name) for name in ("tokens", "last", "generator_state"))
        except KeyError as error:
            raise ValueError(f"no snapshot of a stream: there is no tensor {error.args[0]!r}") from error
        written = states_of_tensors(model.model.blocks, states) if int(tokens) else []
        return cls(SubquadCache(written, int(tokens)), last.to(model.device), generator_state.cpu())


class StreamingGenerator:
    """Yields one token after another, int64 (B,) each, without end.

    Args:
        model: in evaluation mode, all its mixers with a state that stops growing.
        prompt: int (B, L), of any length.
        attention_mask: (B, L), 1 or True for real tokens; the last one must be real in every row, so pad on the left.
        piece: tokens of the prompt that are read at a time.
        sampling: None for the most probable token.
        seed: of the random generator, which is this stream's own.

    Raises:
        ValueError: a model that can't stream, an empty prompt, or one that ends in padding.
    """

    def __init__(
        self,
        model: SubquadForCausalLM,
        prompt: Tensor,
        *,
        attention_mask: Tensor | None = None,
        piece: int = 512,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        check_streamable(model)
        check_tokens("prompt", prompt, model.config.vocab_size)
        if piece < 1:
            raise ValueError(f"StreamingGenerator: piece must be at least 1 token, got {piece}")
        if attention_mask is not None:
            _check_padding(attention_mask, prompt)
        self.model = model
        self.sampling = sampling
        self._generator = torch.Generator(model.device).manual_seed(seed)
        self._cache = SubquadCache()
        self._last = prompt[:, -1:]
        self._read(prompt[:, :-1], attention_mask, piece)

    @classmethod
    def resume(cls, model: SubquadForCausalLM, snapshot: StreamSnapshot, *, sampling: Sampling | None = None) -> Self:
        """Go on from a snapshot exactly as the stream that it was taken of.

        Raises:
            ValueError: a model that can't stream.
        """
        stream = cls(model, snapshot.last, sampling=sampling)
        stream._cache = snapshot.cache
        stream._generator.set_state(snapshot.generator_state)
        return stream

    def snapshot(self) -> StreamSnapshot:
        """This moment; going on doesn't change it."""
        return StreamSnapshot(self._cache, self._last, self._generator.get_state())

    @property
    def state_bytes(self) -> int:
        """What the stream keeps, whatever its length."""
        return self._cache.nbytes

    def __iter__(self) -> Iterator[Tensor]:
        """The stream itself."""
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        """The next token of every row, int64 (B,)."""
        output = self.model(self._last, past_key_values=self._cache, logits_to_keep=1)
        token = choose(output.logits[:, -1], self.sampling, self._generator)
        self._cache, self._last = output.past_key_values, token[:, None]
        return token

    @torch.no_grad()
    def _read(self, prompt: Tensor, attention_mask: Tensor | None, piece: int) -> None:
        for start in range(0, prompt.shape[1], piece):
            part = slice(start, min(start + piece, prompt.shape[1]))
            attention = None if attention_mask is None else attention_mask[:, part]
            output = self.model.model(prompt[:, part], attention, past_key_values=self._cache)
            self._cache = output.past_key_values


def _check_padding(attention_mask: Tensor, prompt: Tensor) -> None:
    if attention_mask.shape != prompt.shape:
        raise ValueError(
            f"StreamingGenerator: attention_mask must have the prompt's shape (B, L) = {tuple(prompt.shape)}, got "
            f"{tuple(attention_mask.shape)}"
        )
    if not bool((attention_mask[:, -1] != 0).all()):
        raise ValueError("StreamingGenerator: the prompt must end in real tokens; pad it on the left")


def check_streamable(model: SubquadForCausalLM) -> None:
    """Refuse a model whose memory would grow, or that isn't in evaluation mode.

    Raises:
        ValueError: naming the mixers, and those whose state stops growing.
    """
    if model.training:
        raise ValueError("StreamingGenerator: the model is in training mode, where dropout acts; call model.eval()")
    mixers = [layer.mixer.config for layer in layers_of(model.model.blocks)]
    growing = {mixer.name: mixer.traits.state for mixer in mixers if not mixer.traits.constant_state}
    if growing:
        reasons = {True: "its state grows with every token", False: "it has no state"}
        found = ", ".join(f"{name} ({reasons[has_state]})" for name, has_state in sorted(growing.items()))
        able = ", ".join(sorted({*mixers_with("constant_state")} & {*mixers_with("causal")}))
        raise ValueError(f"StreamingGenerator: memory can't stay constant with {found}; it does with {able}")
