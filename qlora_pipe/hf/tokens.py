"""Records to token rows: windows of plain text, or a chat whose answers alone are scored."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_pipe.errors import DataError
from qlora_pipe.hf.sequences import IGNORED, Packer, Row
from qlora_pipe.records import ASSISTANT, Message, Record

_CHARACTERS_PER_TOKEN = 8

Tell = Callable[[str], None]
"""Takes a sentence for the user."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, from this machine only."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def rows(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    length: int,
    count: int,
    name: str,
    at_least: int = 1,
    packing: bool = False,
    tell: Tell = lambda sentence: None,
) -> list[Row]:
    """At most `count` rows of at most `length` tokens; raises DataError if there are fewer than `at_least`.

    Plain text is joined and cut into windows without overlap, each beginning with the tokens the tokenizer itself puts
    first (Gemma's <bos>, nothing for most). A chat is one row, or with `packing` shares one with others; what exceeds
    `length` is cut off, and a chat without a scored token left is dropped: `tell` is told how many.
    """
    if records and records[0].prompt is None:
        text = "\n\n".join(record.text for record in records[: count * length])
        span = count * length * _CHARACTERS_PER_TOKEN
        found = _windows(tokenizer, text[:span], length)[:count]
        while len(found) < count and span < len(text):
            span *= 2
            found = _windows(tokenizer, text[:span], length)[:count]
    else:
        found = _chats(tokenizer, records, length, count, packing=packing, tell=lambda text: tell(f"{name}: {text}"))
    if not found:
        raise DataError(f"{name}: too short, not one row of {length} tokens; give more text or another length")
    if len(found) < at_least:
        tokens = sum(len(row.input_ids) for row in found)
        raise DataError(
            f"{name}: too short, expected {at_least} rows of {length} tokens ({at_least * length} tokens), found "
            f"{len(found)} ({tokens} tokens); give more text, or ask for fewer or shorter sequences"
        )
    return found


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[Row]:
    prefix = _first_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = length - len(prefix)
    if length < 2 or step < 1:
        return []  # a window must hold a token that is predicted
    cuts = (tuple(ids[start : start + step]) for start in range(0, len(ids) - step + 1, step))
    return [Row(prefix + cut, prefix + cut) for cut in cuts]


def _chats(
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record],
    length: int,
    count: int,
    *,
    packing: bool,
    tell: Tell,
) -> list[Row]:
    packer, found = Packer(length), list[Row]()
    seen = cut = dropped = 0
    for whole in (_chat(tokenizer, record) for record in records):
        row = Row(whole.input_ids[:length], whole.labels[:length])
        seen, cut = seen + 1, cut + (len(whole.input_ids) > length)
        if not row.scored:
            dropped += 1
        elif packing:
            # The last sequence but the one that shows that `count` are full.
            if packer.add(row) > count:
                break
        else:
            found.append(row)
            if len(found) == count:
                break
    if cut:
        left_out = f", and {dropped} of them left out, as no answer began before" if dropped else ""
        tell(f"{cut} of {seen} rows were cut at {length} tokens{left_out}")
    return packer.rows(count) if packing else found


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text; what some put after it has no place in front."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return tuple(whole[: whole.index(bare[0])])


def _chat(tokenizer: PreTrainedTokenizerBase, record: Record) -> Row:
    """The whole chat, in the model's template if it has one; only answers are scored."""
    assert record.prompt is not None
    chat = [*record.earlier, Message("user", record.prompt), Message(ASSISTANT, record.text)]
    if tokenizer.chat_template:
        pieces = _templated(tokenizer, chat)
    else:
        pieces = _untemplated(chat, record.plain, tokenizer.eos_token or "")
    ids = [] if tokenizer.chat_template else [*_first_tokens(tokenizer)]
    labels = [IGNORED] * len(ids)
    for text, is_answer in pieces:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        ids += tokens
        labels += tokens if is_answer else [IGNORED] * len(tokens)
    return Row(tuple(ids), tuple(labels))


def _templated(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message]) -> list[tuple[str, bool]]:
    """Pieces of the text, and whether they are an answer. Where the template changes what was said before once the
    chat goes on, as those that drop earlier thoughts do, the last answer alone is one."""

    def template(messages: Sequence[Message], *, asks: bool) -> str:
        body = [{"role": message.role, "content": message.text} for message in messages]
        try:
            text: str = tokenizer.apply_chat_template(body, tokenize=False, add_generation_prompt=asks)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the model's chat template refuses a chat of {roles}: {error}; convert such records, or leave them out"
            ) from error
        return text

    done, pieces = "", []
    for end, message in enumerate(chat):
        if message.role != ASSISTANT:
            continue
        asked, answered = template(chat[:end], asks=True), template(chat[: end + 1], asks=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            last = chat[-1].text + (tokenizer.eos_token or "")
            return [(template(chat[:-1], asks=True), False), (last, True)]
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    return pieces


def _untemplated(chat: Sequence[Message], plain: str | None, end: str) -> list[tuple[str, bool]]:
    """One line a message, and the end of the text after every answer; `plain` instead of all but the last."""
    before = [Message("user", plain)] if plain is not None else chat[:-1]
    roles = [(message.text, message.role == ASSISTANT) for message in [*before, chat[-1]]]
    return [(text + (end if is_answer else "\n"), is_answer) for text, is_answer in roles]
