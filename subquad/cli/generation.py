"""What the verb `generate` does once its options are read: load, check, write byte by byte."""

from __future__ import annotations

import codecs
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import transformers
from torch import Tensor

from subquad.byte_ids import BYTES
from subquad.cli.console import print_document, progress_console
from subquad.models.block import layers_of
from subquad.models.cache import SubquadCache
from subquad.models.causal_lm import SubquadForCausalLM
from subquad.models.configuration import SubquadConfig
from subquad.models.sampling import Sampling, choose
from subquad.models.streaming import StreamingGenerator


@dataclass(frozen=True)
class Wish:
    """What to write; see `Sampling`.

    Attributes:
        tokens: how many bytes.
        temperature: 0 for the likeliest byte.
        top_k: None for all.
        top_p: None for all.
        seed: of the random generator.
    """

    tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int

    def sampling(self) -> Sampling | None:
        """How to choose.

        Raises:
            ValueError: a value out of range, or restrictions beside a temperature of 0.
        """
        if self.temperature > 0:
            return Sampling(self.temperature, self.top_k, self.top_p)
        if self.top_k is not None or self.top_p is not None:
            raise ValueError("--temperature 0 takes the likeliest byte; leave out --top-k and --top-p, or raise it")
        return None


def generate(directory: Path, *, prompt: str, prompt_file: Path | None, wish: Wish, as_json: bool) -> None:
    """Write the prompt and what follows; on standard error, how fast.

    Raises:
        ValueError: no such model, a model of another kind, an empty prompt, or a longer text than the model can read.
    """
    sampling = wish.sampling()
    beginning = _beginning(prompt, prompt_file)
    model = load_model(directory)
    _check_length(model.config, len(beginning), wish.tokens)
    tokens = torch.tensor([list(beginning)], device=model.device)
    text = _Text(quiet=as_json)
    text.add(beginning)
    began = time.perf_counter()
    for token in written(model, tokens, wish, sampling):
        text.add(bytes([token]))
    seconds = time.perf_counter() - began
    text.end()
    if as_json:
        facts = {"text": text.whole, "bytes": wish.tokens, "seconds": seconds, "seed": wish.seed}
        print_document(facts)
    progress_console().print(f"{wish.tokens / seconds:,.0f} tokens/second", markup=False)


def _beginning(prompt: str, prompt_file: Path | None) -> bytes:
    if prompt_file is not None and prompt:
        raise ValueError("give the beginning once: --prompt or --prompt-file")
    beginning = os.fsencode(prompt) if prompt_file is None else prompt_file.read_bytes()
    if not beginning:
        raise ValueError("the text needs a beginning of at least one byte: --prompt TEXT or --prompt-file FILE")
    return beginning


def _check_length(config: SubquadConfig, beginning: int, tokens: int) -> None:
    limit = longest_text(config)
    if limit is None or beginning + tokens <= limit + 1:  # the last byte is written, and never read
        return
    if beginning > limit:
        raise ValueError(f"the beginning has {beginning} bytes, but the model can read no more than {limit}")
    raise ValueError(
        f"--tokens {tokens}: the model can read no more than {limit} bytes, and the beginning has {beginning}; the "
        f"largest --tokens is {limit - beginning + 1}"
    )


def longest_text(config: SubquadConfig) -> int | None:
    """How many tokens a causal model can read, one after the other or at once; None for any number."""
    bound = config.positions in ("learned", "axial") or any(each.traits.fixed_length for each in config.layer_mixers())
    return config.max_position_embeddings if bound else None


def load_model(directory: Path) -> SubquadForCausalLM:
    """The causal language model of bytes in a folder, ready to write; padding and the like have probability 0.

    Raises:
        ValueError: no model there, one of another kind, or one whose ids aren't known to be bytes.
    """
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(f"{directory}: there is no model (no config.json); `subquad run --save-model` writes one")
    try:
        written = json.loads(config.read_text(encoding="utf-8"))
        kinds, byte_ids = written.get("architectures") or [], written.get("byte_ids", False)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{config} is damaged: {error}") from error
    if SubquadForCausalLM.__name__ not in kinds:
        named = ", ".join(kinds) or "no class"
        raise ValueError(f"{directory}: text is written by a {SubquadForCausalLM.__name__}, this is {named}")
    if not byte_ids:
        raise ValueError(
            f"{directory}: this model isn't marked as one of bytes, as those of `subquad run --task text-lm` are; if "
            "each byte is its own id, build such models with SubquadConfig(byte_ids=True), and write "
            f'"byte_ids": true into {config}'
        )
    transformers.utils.logging.disable_progress_bar()
    model = SubquadForCausalLM.from_pretrained(directory).eval()
    padding = model.config.pad_token_id
    never = [token for token in range(model.config.vocab_size) if token >= BYTES or token == padding]
    with torch.no_grad():
        model.lm_head.project.bias[never] = -torch.inf
    return model


def written(model: SubquadForCausalLM, prompt: Tensor, wish: Wish, sampling: Sampling | None) -> Iterator[int]:
    """The bytes that follow a prompt, int64 (1, L), one by one, in constant memory if the states of all mixers allow.

    Raises:
        ValueError: more tokens than the model can read; see `longest_text`.
    """
    traits = [layer.mixer.config.traits for layer in layers_of(model.model.blocks)]
    if all(each.constant_state for each in traits):
        stream: Iterator[Tensor] = StreamingGenerator(model, prompt, sampling=sampling, seed=wish.seed)
    else:
        stream = _growing(model, prompt, wish, sampling, keeps_states=all(each.state for each in traits))
    for token in itertools.islice(stream, wish.tokens):
        yield int(token)


@torch.no_grad()
def _growing(
    model: SubquadForCausalLM, prompt: Tensor, wish: Wish, sampling: Sampling | None, *, keeps_states: bool
) -> Iterator[Tensor]:
    """As `StreamingGenerator`, with states that grow; without states the whole text is read again for every byte."""
    generator = torch.Generator(model.device).manual_seed(wish.seed)
    cache = SubquadCache() if keeps_states else None
    tokens = prompt
    while True:
        output = model(tokens, past_key_values=cache, logits_to_keep=1)
        token = choose(output.logits[:, -1], sampling, generator)
        cache = output.past_key_values if keeps_states else None
        tokens = token[:, None] if keeps_states else torch.cat((tokens, token[:, None]), dim=1)
        yield token


class _Text:
    """Bytes as text on standard output, as they come; what is no UTF-8, or would steer a terminal, is made visible."""

    def __init__(self, *, quiet: bool) -> None:
        self.whole = ""
        self._quiet = quiet
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> None:
        """Show what these bytes complete."""
        self._show(self._decoder.decode(piece))

    def end(self) -> None:
        """Show what is left, and end the line."""
        self._show(self._decoder.decode(b"", final=True))
        if not self._quiet:
            sys.stdout.write("\n")

    def _show(self, text: str) -> None:
        if self._quiet:
            self.whole += text
        elif text:
            sys.stdout.write(visible(text))
            sys.stdout.flush()


def visible(text: str) -> str:
    """The text with its control characters, but for tabs and ends of lines, as pictures: the escape character is ␛."""
    return "".join(_PICTURES.get(character, character) for character in text)


_PICTURES: Mapping[str, str] = MappingProxyType(
    {
        **{chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"},
        **{chr(code): "\N{REPLACEMENT CHARACTER}" for code in range(0x80, 0xA0)},
        "\x7f": "\N{SYMBOL FOR DELETE}",
    }
)
