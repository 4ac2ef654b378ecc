"""Text to token ids and back, from a model folder's tokenizer files, without torch or transformers.

The user's text is data. A chat template is rendered with a random stand-in for each message; only the template's own
text may become special tokens, and messages are put in afterwards and encoded by a tokenizer that knows no special
token. So `<|im_end|>` in a comment is seven ordinary tokens, and ids equal transformers' `apply_chat_template` for
every text that contains no special token, with two exceptions made on purpose:

- an assistant's answer starts its own tokens where it was generated, so that a longer chat extends a shorter one token
  for token (a leading newline is then not merged with the template's), and follows the same generation prompt as when
  it was generated (Qwen3's empty think block stays in later turns);
- Unicode normalisation (NFC) is left out: code must come back as it went in.

Definitions of tools and calls of them go through the template itself; there a character of what would be a special
token is written as its JSON escape.

Not covered: images, WordPiece and Unigram tokenizers with a lossy decoder, templates that need Python code.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from engine.errors import ModelError
from engine.inference.mending import mending_hint
from engine.inference.protocol import Message

# White space around a stand-in: what is left of it tells how a template strips a message. No template writes the space,
# and the newlines are too many to be taken for a template's own.
_SPACE = "\u205f"
_NEWLINES = "\n" * 8
_LONG_TEXT_CHARS = 20_000
_TEXT_END_TOKENS = ("<|endoftext|>",)  # ends a document in several model families; never part of a chat answer
# Fill in the middle: the tokens before the prefix, before the suffix and before the answer, by model family.
_FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
)
_FIM_ENDS = ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>", "<fim_pad>", "<file_sep>")
_OTHER_MODEL = "Use another instruct or chat model: planpatch models list"
_CONTINUATION = "continuation"
_START = "start"
_SECTION = "section"


@dataclass(frozen=True, slots=True)
class _AddedToken:
    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of a rendered prompt: template text, or a message's content (then `role` is set)."""

    text: str
    role: str = ""


class HFChatTokenizer:
    """The `ChatTokenizer` of a model folder (`tokenizer.json` and a chat template). Thread-safe.

    Args:
        folder: Folder with `tokenizer.json`, `tokenizer_config.json` and, for chats, a chat template.

    Raises:
        ModelError: A file is missing or damaged, or the tokenizer's kind is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._read_folder(folder)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as fault:
            raise ModelError(
                f"The tokenizer in {folder} is damaged: {type(fault).__name__}: {fault}", hint=mending_hint(folder)
            ) from fault

    def _read_folder(self, folder: Path) -> None:
        spec = _read_json(folder / "tokenizer.json")
        self._config = _read_json(folder / "tokenizer_config.json", missing_ok=True)
        self._added = _added_tokens(spec)
        self._added_ids = {token.content.strip(): token.id for token in self._added if token.content.strip()}
        self._names = {token.id: token.content for token in self._added}
        self._special_ids = frozenset(token.id for token in self._added if token.special)
        self._guarded_ids = frozenset(token.id for token in self._added if token.content.strip())
        self._added_pattern = _added_pattern(self._added)
        self._encoders = _data_encoders(spec, self._added, folder)
        self._byte_level = _is_byte_level(spec, folder)
        self._vocabulary = self._encoders[_START]
        self._bytes_of: dict[int, bytes] = {token.id: token.content.encode() for token in self._added}
        self._template = _ChatTemplate(folder, self._config, self._added_pattern)
        self.eos_token_ids = self._find_eos_token_ids()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as data: text that looks like a special token stays text.

        Args:
            text: Any text; it is taken as the continuation of something, so no space is put before it.

        Returns:
            Token ids; `decode` gives `text` back.
        """
        return self._encode_data(text, _CONTINUATION)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out.

        Args:
            token_ids: Ids; an id that the vocabulary does not have (padding of the embedding) has no text.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.
        """
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text; empty for special tokens and unknown ids."""
        if token_id in self._special_ids:
            return b""
        known = self._bytes_of.get(token_id)
        if known is None:
            token = self._vocabulary.id_to_token(token_id)
            known = b"" if token is None else _token_to_bytes(token, self._byte_level)
            self._bytes_of[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """A token as a person reads it: special ones by their name, bytes that are no whole character as U+FFFD."""
        name = self._names.get(token_id, "") if token_id in self._special_ids else ""
        return name or self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """Id of an added token such as `<|im_end|>`; None if the tokenizer has no such token."""
        return self._added_ids.get(token)

    @property
    def end_of_answer_id(self) -> int:
        """The token that ends an answer in a chat: what the template writes after one, else an end token."""
        name = self._template.end_of_answer(self._added_pattern)
        return self._added_ids[name] if name in self._added_ids else min(self.eos_token_ids)

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._template.source is not None

    @property
    def has_tools(self) -> bool:
        """Whether the chat template takes definitions of tools."""
        return re.search(r"\btools\b", self._template.source or "") is not None

    @property
    def has_thinking(self) -> bool:
        """Whether the chat template can switch thinking on and off."""
        return "enable_thinking" in (self._template.source or "")

    @property
    def has_fim(self) -> bool:
        """Whether the model can fill in the middle."""
        return self._fim_token_ids() is not None

    @property
    def fim_end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a middle besides the model's own."""
        return tuple(self._added_ids[token] for token in _FIM_ENDS if token in self._added_ids)

    def _fim_token_ids(self) -> list[int] | None:
        for tokens in _FIM_TOKENS:
            if all(token in self._added_ids for token in tokens):
                return [self._added_ids[token] for token in tokens]
        return None

    def encode_fim(self, before: str, after: str) -> list[int]:
        """Prompt that asks for what stands between two texts (Bavarian et al. 2022, prefix-suffix-middle).

        Args:
            before: The text before the gap, as data.
            after: The text behind it, as data.

        Returns:
            Token ids.

        Raises:
            ModelError: The model cannot fill in the middle.
        """
        found = self._fim_token_ids()
        if found is None:
            raise ModelError(f"The model in {self.folder} cannot fill in the middle", hint=_OTHER_MODEL)
        prefix, suffix, middle = found
        return [prefix, *self._encode_data(before, _SECTION), suffix, *self._encode_data(after, _SECTION), middle]

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a whole prompt that somebody else templated: special tokens in it are special.

        Args:
            text: The prompt.

        Returns:
            Token ids.
        """
        return self._encode_run([_Part(text)], _START)

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Ids of a prompt that somebody else templated, with what came from where still told apart.

        Args:
            parts: Each text, and whether it is data, in which what looks like a special token stays text.

        Returns:
            Token ids.
        """
        return self._encode_run([_Part(text, "user" if is_data else "") for text, is_data in parts], _START)

    def encode_chat(
        self, messages: Sequence[Message], *, prefill: str = "", tools: Sequence[str] = (), thinking: bool = False
    ) -> list[int]:
        """Prompt of a chat, ending where the assistant's answer starts (after `prefill`, its given beginning).

        Args:
            messages: The turns, oldest first.
            prefill: First words of the answer, as data.
            tools: Tools that the model may call: JSON objects in OpenAI's form, as text.
            thinking: Let a model think that can.

        Returns:
            Token ids. `encode_chat(messages)` is a prefix of `encode_chat(messages, prefill=...)` and of the prompt of
            every longer chat that starts with `messages` and an assistant's answer.

        Raises:
            ModelError: The model has no chat template, or the template refuses these messages.
        """
        token_ids: list[int] = []
        for is_start, run in self._runs(self._template.render(messages, tools, thinking)):
            token_ids += self._encode_run(run, _START if is_start else _SECTION)
        return token_ids + self.encode(prefill)

    def _runs(self, parts: Sequence[_Part]) -> Iterator[tuple[bool, list[_Part]]]:
        """Split a prompt where an assistant's content starts; the flag is True for the first run."""
        run: list[_Part] = []
        is_start = True
        for part in parts:
            if part.role == "assistant":
                yield is_start, run
                is_start, run = False, []
            run.append(part)
        yield is_start, run

    def _encode_run(self, run: Sequence[_Part], scheme: str) -> list[int]:
        """Special tokens of the template parts, and between them template text and contents encoded together."""
        token_ids: list[int] = []
        text = ""
        if run and run[0].role:
            scheme = _CONTINUATION
        for part in run:
            if part.role:
                text += part.text
                continue
            for literal, token in self._split_template(part.text):
                text += literal
                if token is None:
                    continue
                token_ids += [*self._encode_data(text, scheme), token]
                text, scheme = "", _SECTION
        return token_ids + self._encode_data(text, scheme)

    def _split_template(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Template text as (ordinary text, the special token after it or None at the end)."""
        start = 0
        if self._added_pattern is not None:
            for match in self._added_pattern.finditer(text):
                yield text[start : match.start()], self._added_ids[match.group().strip()]
                start = match.end()
        yield text[start:], None

    def _encode_data(self, text: str, scheme: str) -> list[int]:
        """Ids of `text` in which no special token can occur."""
        if not text:
            return []
        token_ids = _ids_of(self._encoders[scheme], text)
        if self._guarded_ids.isdisjoint(token_ids):
            return token_ids
        return self._encode_guarded(text, scheme)

    def _encode_guarded(self, text: str, scheme: str) -> list[int]:
        """For vocabularies whose merges can form a special token: each one is cut after its first character."""
        token_ids: list[int] = []
        pattern = self._added_pattern or re.compile(r"(?!)")
        start = 0
        cuts = [match.start() + 1 for match in pattern.finditer(text)]
        for end in [*cuts, len(text)]:
            token_ids += self._encoders[scheme].encode(text[start:end], add_special_tokens=False).ids
            start, scheme = end, _CONTINUATION
        if not self._guarded_ids.isdisjoint(token_ids):
            raise ModelError(
                f"The tokenizer in {self.folder} turns ordinary text into a special token, so that text in your code "
                "could pose as an instruction",
                hint=_OTHER_MODEL,
            )
        return token_ids

    def _find_eos_token_ids(self) -> frozenset[int]:
        generation = _read_json(self.folder / "generation_config.json", missing_ok=True)
        model = _read_json(self.folder / "config.json", missing_ok=True)
        found = {*_as_ids(generation.get("eos_token_id")), *_as_ids(model.get("eos_token_id"))}
        names = [_token_text(self._config.get("eos_token")), self._template.end_of_answer(self._added_pattern)]
        found.update(self._added_ids[name] for name in [*names, *_TEXT_END_TOKENS] if name in self._added_ids)
        if not found:
            raise ModelError(
                f"No end token is named in {self.folder} (generation_config.json, config.json, tokenizer_config.json)",
                hint="Add eos_token_id to generation_config.json, or use another model.",
            )
        return frozenset(found)


class Detokenizer:
    """Turns generated ids into text as they come; what advances by tokens can go back by tokens.

    Bytes of an incomplete UTF-8 character are held back until the rest arrives. The texts that `push` and `flush`
    return, joined, equal `tokenizer.decode` of all ids.

    Args:
        tokenizer: The tokenizer that the ids belong to.
    """

    def __init__(self, tokenizer: HFChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._states: list[tuple[int, tuple[bytes, int]]] = []  # text length and decoder state before each token
        self.text = ""

    @property
    def num_tokens(self) -> int:
        """Ids pushed and not rolled back."""
        return len(self._states)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids.

        Args:
            token_ids: The next generated ids.

        Returns:
            The text that became complete.
        """
        start = len(self.text)
        for token_id in token_ids:
            self._states.append((len(self.text), self._decoder.getstate()))
            self.text += self._decoder.decode(self._tokenizer.token_bytes(token_id))
        return self.text[start:]

    def rollback(self, num_tokens: int) -> int:
        """Take back the last `num_tokens` ids.

        Args:
            num_tokens: How many; at most `self.num_tokens`.

        Returns:
            How many characters of already returned text are void.
        """
        assert 0 <= num_tokens <= len(self._states), "more ids rolled back than pushed"
        if num_tokens == 0:
            return 0
        length, state = self._states[-num_tokens]
        num_void = len(self.text) - length
        del self._states[-num_tokens:]
        self._decoder.setstate(state)
        self.text = self.text[:length]
        return num_void

    def flush(self) -> str:
        """Text of bytes still held back, as U+FFFD; call it once, at the end."""
        rest = self._decoder.decode(b"", final=True)
        self.text += rest
        return rest


class _Marked:
    """A message and the random stand-in that is rendered in its place."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.name = f"Mark {secrets.token_hex(16)}\n<'\"&\\>"  # whatever rewrites text rewrites some of this

    def for_template(self) -> dict[str, Any]:
        """The message as the template is given it."""
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in self.message.tool_calls
        ]
        shown = {"role": self.message.role, "content": self.stand_in}
        return {**shown, "tool_calls": calls} if calls else shown

    @property
    def stand_in(self) -> str:
        return f"{_NEWLINES}{_SPACE}{self.name}{_SPACE}{_NEWLINES}" if self.message.content else ""

    def content(self, before: str, after: str) -> tuple[str, str, str]:
        """Cut the padding from the text around the stand-in, and strip the content as the template stripped it."""
        content = self.message.content
        if before.endswith(_NEWLINES + _SPACE):
            before = before.removesuffix(_NEWLINES + _SPACE)
        elif before.endswith(_SPACE):
            before, content = before.removesuffix(_SPACE), content.lstrip("\n")
        else:
            content = content.lstrip()
        if after.startswith(_SPACE + _NEWLINES):
            after = after.removeprefix(_SPACE + _NEWLINES)
        elif after.startswith(_SPACE):
            after, content = after.removeprefix(_SPACE), content.rstrip("\n")
        else:
            content = content.rstrip()
        return before, content, after


class _ChatTemplate:
    """The model's chat template, rendered so that messages can be told from template text."""

    def __init__(self, folder: Path, config: dict[str, Any], added_pattern: re.Pattern[str] | None) -> None:
        self._folder = folder
        self.source = source = _template_source(folder, config)
        special_tokens = {**_read_json(folder / "special_tokens_map.json", missing_ok=True), **config}
        self._variables = {
            name: _token_text(value) for name, value in special_tokens.items() if name.endswith("_token")
        }
        try:
            self._compiled = None if source is None else _environment(added_pattern).from_string(source)
        except TemplateError as error:
            raise ModelError(f"The chat template in {folder} cannot be read: {error}", hint=_OTHER_MODEL) from error

    def render(self, messages: Sequence[Message], tools: Sequence[str] = (), thinking: bool = False) -> list[_Part]:
        """The whole prompt in parts, generation prompt last."""
        options = {"tools": [json.loads(tool) for tool in tools] or None, "enable_thinking": thinking}
        marked, text = self._render_merging_system([_Marked(message) for message in messages], options)
        for index, mark in reversed(list(enumerate(marked))) if self._changes_generation_prompt else ():
            if index and mark.message.role == "assistant" and mark.message.content:
                text = self._restore_generation_prompt(text, marked, index, options)
        return self._split(text, marked)

    @cached_property
    def _changes_generation_prompt(self) -> bool:
        """Whether an earlier answer is shown after another prompt than it was generated after; looked at once.

        Looking costs one rendering for each answer, which a long chat would feel.
        """
        turns = [_Marked(Message("user", "?")), _Marked(Message("assistant", "!")), _Marked(Message("user", "?"))]
        try:
            text = self._render(turns, {})
            return self._restore_generation_prompt(text, turns, 1, {}) != text
        except ModelError:  # it refuses such a chat, and will say so
            return False

    def end_of_answer(self, added_pattern: re.Pattern[str] | None) -> str:
        """The special token that the template writes after an assistant's answer; empty if there is none."""
        if self._compiled is None or added_pattern is None:
            return ""
        marked = [_Marked(Message("user", "?")), _Marked(Message("assistant", "!"))]
        after = self._render(marked, {}, add_generation_prompt=False).partition(marked[1].name)[2]
        found = added_pattern.match(after.lstrip())
        return "" if found is None else found.group().strip()

    def _render_merging_system(self, marked: list[_Marked], options: dict[str, Any]) -> tuple[list[_Marked], str]:
        """Render; where the template refuses a system message, put its text before the first user message."""
        try:
            return marked, self._render(marked, options)
        except ModelError:
            if [mark.message.role for mark in marked[:2]] != ["system", "user"]:
                raise
            merged = "\n\n".join(mark.message.content for mark in marked[:2])
            marked = [_Marked(Message("user", merged)), *marked[2:]]
            return marked, self._render(marked, options)

    def _restore_generation_prompt(
        self, text: str, marked: Sequence[_Marked], index: int, options: dict[str, Any]
    ) -> str:
        """Let an earlier answer follow the same generation prompt as when it was generated.

        Some templates leave part of it out of later turns (Qwen3: the empty think block), which would make the KV
        cache of the shorter chat useless.
        """
        mark = marked[index]
        before, found, _ = text.partition(mark.name)
        head = mark.content(before, "")[0]
        prompt = self._render(marked[:index], options)
        return prompt + text[len(head) :] if found and prompt.startswith(head) else text

    def _split(self, text: str, marked: Sequence[_Marked]) -> list[_Part]:
        by_name = {mark.name: mark for mark in marked}
        parts: list[_Part] = []
        pieces = re.split("(" + "|".join(map(re.escape, by_name)) + ")", text) if by_name else [text]
        before = pieces[0]
        for name, after in zip(pieces[1::2], pieces[2::2], strict=True):
            mark = by_name[name]
            before, content, after = mark.content(before, after)
            parts += [_Part(before), _Part(content, mark.message.role)]
            before = after
        parts.append(_Part(before))
        if any(mark.message.content and mark.name not in text for mark in marked):
            raise ModelError(
                f"The chat template in {self._folder} rewrites or leaves out messages, which PlanPatch cannot follow",
                hint=_OTHER_MODEL,
            )
        return parts

    def _render(self, marked: Sequence[_Marked], options: dict[str, Any], *, add_generation_prompt: bool = True) -> str:
        if self._compiled is None:
            raise ModelError(f"The model in {self._folder} has no chat template", hint=_OTHER_MODEL)
        try:
            return self._compiled.render(
                messages=[mark.for_template() for mark in marked],
                add_generation_prompt=add_generation_prompt,
                documents=None,
                **self._variables,
                **{"enable_thinking": False, "tools": None, **options},
            )
        except TemplateError as error:
            raise ModelError(
                f"The chat template in {self._folder} refuses these messages: {error}", hint=_OTHER_MODEL
            ) from error


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; here it only passes its body on."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(added_pattern: re.Pattern[str] | None) -> ImmutableSandboxedEnvironment:
    def as_json(value: Any, indent: int | None = None, **_: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        return text if added_pattern is None else added_pattern.sub(_first_escaped, text)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _first_escaped(match: re.Match[str]) -> str:
    """A special token in a JSON string as the same string that is no special token."""
    token = match.group()
    place = len(token) - len(token.lstrip())
    return f"{token[:place]}\\u{ord(token[place]):04x}{token[place + 1 :]}"


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    source = config.get("chat_template") or _read_json(folder / "chat_template.json", missing_ok=True).get(
        "chat_template"
    )
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source


def _ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text; a long one is encoded as a batch, which lets other threads run meanwhile."""
    if len(text) < _LONG_TEXT_CHARS:
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids


def _added_tokens(spec: dict[str, Any]) -> list[_AddedToken]:
    return [
        _AddedToken(
            id=token["id"],
            content=token["content"],
            special=token.get("special", False),
            lstrip=token.get("lstrip", False),
            rstrip=token.get("rstrip", False),
        )
        for token in spec.get("added_tokens") or []
    ]


def _added_pattern(added: Sequence[_AddedToken]) -> re.Pattern[str] | None:
    """Longest token first, as the tokenizer itself prefers; white space that a token swallows belongs to its match."""
    tokens = sorted((token for token in added if token.content.strip()), key=lambda token: -len(token.content))
    branches = [
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in tokens
    ]
    return re.compile("|".join(branches)) if branches else None


def _data_encoders(spec: dict[str, Any], added: Sequence[_AddedToken], folder: Path) -> dict[str, Tokenizer]:
    """Tokenizers that know no special token, for text at the start, after a special token, and in mid-text.

    They differ only where a tokenizer puts a space before text (sentencepiece).
    """
    spec = {**spec, "post_processor": None, "truncation": None, "padding": None}
    spec["normalizer"] = _without(spec.get("normalizer"), "NFC")
    start = _build(spec, added, folder)
    section = {**spec, "pre_tokenizer": _unprefixed(spec.get("pre_tokenizer"), schemes=("first",))}
    continuation = {
        **spec,
        "normalizer": _without(spec["normalizer"], "Prepend"),
        "pre_tokenizer": _unprefixed(spec.get("pre_tokenizer"), schemes=("first", "always")),
    }
    return {
        _START: start,
        _SECTION: start if section == spec else _build(section, added, folder),
        _CONTINUATION: start if continuation == spec else _build(continuation, added, folder),
    }


def _build(spec: dict[str, Any], added: Sequence[_AddedToken], folder: Path) -> Tokenizer:
    """Tokenizer without added tokens; runs of white space are kept where their ids stay the same."""
    white_space = [token for token in added if not token.special and not token.content.strip()]
    kept = [entry for entry in spec.get("added_tokens") or [] if entry["id"] in {token.id for token in white_space}]
    try:
        tokenizer = Tokenizer.from_str(json.dumps({**spec, "added_tokens": kept}))
        if all(tokenizer.token_to_id(token.content) == token.id for token in white_space):
            return tokenizer
        return Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"{folder / 'tokenizer.json'} cannot be read: {error}", hint=mending_hint(folder)) from error


def _members(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, a Sequence taken apart."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    inner = next(value for value in component.values() if isinstance(value, list))
    return [step for member in inner for step in _members(member)]


def _without(normalizer: dict[str, Any] | None, kind: str) -> dict[str, Any] | None:
    steps = [step for step in _members(normalizer) if step["type"] != kind]
    if len(steps) == len(_members(normalizer)):
        return normalizer
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _unprefixed(pre_tokenizer: dict[str, Any] | None, schemes: Sequence[str]) -> dict[str, Any] | None:
    """The same steps without the space that they would put before text."""
    before = _members(pre_tokenizer)
    after = [_unprefixed_step(step, schemes) for step in before]
    return pre_tokenizer if after == before else {"type": "Sequence", "pretokenizers": after}


def _unprefixed_step(step: dict[str, Any], schemes: Sequence[str]) -> dict[str, Any]:
    if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") in schemes:
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel" and step.get("add_prefix_space") and "always" in schemes:
        return {**step, "add_prefix_space": False}
    return step


def _is_byte_level(spec: dict[str, Any], folder: Path) -> bool:
    kinds = {step["type"] for step in _members(spec.get("decoder"))}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"Metaspace", "ByteFallback"}:
        return False
    raise ModelError(
        f"The tokenizer in {folder} is of a kind that PlanPatch cannot use (decoder {sorted(kinds)})", hint=_OTHER_MODEL
    )


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2's table); this is the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _token_to_bytes(token: str, byte_level: bool) -> bytes:
    if byte_level:
        if all(character in _ALPHABET for character in token):
            return bytes(_ALPHABET[character] for character in token)
        return token.encode()
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _token_text(value: Any) -> str:
    """A special token of tokenizer_config.json, which may be written as text or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=mending_hint(path.parent)) from error


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}", hint=mending_hint(path.parent)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: it holds no JSON object", hint=mending_hint(path.parent))
    return value
