"""Grammar-constrained decoding with rollback, by llguidance.

llguidance was chosen over xgrammar because it compiles a grammar made for one function in milliseconds, has one wheel
per platform for all Python versions and brings no dependencies; DECISIONS.md has the figures.
"""

from __future__ import annotations

import json
from pathlib import Path

import llguidance
import numpy as np
import torch

from engine.errors import UsageError
from engine.inference.protocol import Grammar


class GrammarCompiler:
    """Makes matchers for one tokenizer; building it takes a second, so it is made on first use.

    Args:
        folder: Model folder with tokenizer.json.
        vocab_size: Length of a row of logits, which may exceed the tokenizer's.
        eos_token_id: The end token that a complete text allows.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_id: int) -> None:
        spec = (folder / "tokenizer.json").read_text(encoding="utf-8")
        self._tokenizer = llguidance.LLTokenizer(spec, n_vocab=vocab_size, eos_token=eos_token_id)
        self._vocab_size = vocab_size

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the start of `grammar`.

        Raises:
            UsageError: The grammar cannot be compiled.
        """
        matcher = llguidance.LLMatcher(self._tokenizer, _llguidance_grammar(grammar), log_level=0)
        if matcher.is_error():
            raise UsageError(f"The {grammar.kind} grammar cannot be used: {matcher.get_error()}")
        return GrammarMatcher(matcher, self._vocab_size)


class GrammarMatcher:
    """Follows a generation through a grammar. Advances by tokens and goes back by tokens."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_complete(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> torch.Tensor:
        """The tokens that may come next, bool `[vocab_size]` on CPU.

        Raises:
            UsageError: The grammar needs more states than llguidance allows; it would let the text end unfinished.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise self._fault()
        bits = np.unpackbits(packed, bitorder="little")[: self._vocab_size]
        return torch.from_numpy(bits).bool()

    def advance(self, token_id: int) -> None:
        """Take the next token, which `allowed` must have allowed.

        Raises:
            UsageError: The grammar needs more states than llguidance allows.
        """
        if not self._matcher.consume_token(token_id):
            if "satisfy the grammar" in self._matcher.get_error():
                raise AssertionError(f"the grammar does not allow token {token_id}")
            raise self._fault()

    def _fault(self) -> UsageError:
        """Why it cannot be followed, without the grammar and the parser's state, which belong to one client."""
        reason = self._matcher.get_error().partition("\n")[0].partition("<state>")[0].strip()[:200]
        return UsageError(f"The grammar cannot be followed any further: {reason}", hint="Use a simpler grammar.")

    def copy(self) -> GrammarMatcher:
        """One at the same place that goes its own way; takes a microsecond."""
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size)

    def rollback(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` tokens."""
        if not self._matcher.rollback(num_tokens):
            raise AssertionError(f"cannot go back {num_tokens} tokens: {self._matcher.get_error()}")

    def forced_token_ids(self) -> list[int]:
        """Tokens that the grammar leaves no choice about, from here on."""
        return self._matcher.compute_ff_tokens()


def grammar_fault(grammar: Grammar) -> str:
    """What keeps a grammar from being used, found without a tokenizer.

    Args:
        grammar: The grammar.

    Returns:
        The fault in llguidance's words; empty if there is none.
    """
    try:
        return " ".join(llguidance.LLMatcher.validate_grammar(_llguidance_grammar(grammar)).split())[:300]
    except UsageError as error:
        return error.message
    except ValueError as fault:
        return str(fault)


def _llguidance_grammar(grammar: Grammar) -> str:
    if grammar.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(grammar.text)
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    try:
        json.loads(grammar.text)
    except ValueError as fault:
        raise UsageError(f"The JSON schema is not JSON: {fault}") from fault
    return llguidance.LLMatcher.grammar_from_json_schema(
        grammar.text, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    )
