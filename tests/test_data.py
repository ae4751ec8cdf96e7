"""Reading JSON Lines, tokenising and batching: what is refused and where, and the tokens against transformers' own."""

import hashlib
import json

import pytest

from adapterhub.data import read
from adapterhub.data.batches import IGNORE, collate
from adapterhub.data.encoding import Example, check_vocabulary, encode, grouped
from adapterhub.errors import DataError, NotFound, UsageError

GOOD = '{"prompt": "a", "completion": "b"}'
GOOD_SCORED = '{"prompt": "a", "completions": ["b", "cd"], "rewards": [1, -0.5]}'
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def written(tmp_path):
    def write(*lines, raw=None):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(raw if raw is not None else "\n".join(map(_line, lines)).encode())
        return path

    return write


def _line(row):
    return row if isinstance(row, str) else json.dumps(row)


def talk(*contents):
    return {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    }


# --- reading -----------------------------------------------------------------------------------------------------


def test_rows_keep_their_lines_and_the_digest_is_the_files(written):
    raw = b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\n   \n" + '{"prompt":"\u2028","completion":"c","id":7}'.encode()
    data = read(written(raw=raw))
    assert [(row.line, row.prompt, row.completion) for row in data.rows] == [(1, "a", "b"), (4, "\u2028", "c")]
    assert data.kind == "prompt"
    assert data.digest == "sha256:" + hashlib.sha256(raw).hexdigest()
    assert [row.line for row in data.first(1).rows] == [1]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{'prompt': 'a'}", "not JSON"),
        ('{"prompt": "a", "completion": "b"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "twice"),
        ('["a", "b"]', "not a JSON object"),
        ('{"question": "a"}', "no text in it"),
        ('{"prompt": "a"}', "no 'completion'"),
        ('{"completion": "a"}', "no 'prompt'"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "prompt and text"),
        ('{"prompt": null, "completion": "b"}', "NoneType"),
        ('{"prompt": "a", "completion": 4}', "int"),
        ('{"prompt": "a", "completion": ""}', "empty"),
        ('{"prompt": "a", "completion": " \\n"}', "empty"),
        ('{"prompt": "a", "completion": "\\ud800"}', "surrogate"),
        ('{"text": "a"}', "'text' row among 'prompt' rows"),
    ],
)
def test_a_malformed_line_is_named(written, bad, says):
    path = written(GOOD, bad, GOOD)
    with pytest.raises(DataError, match=says) as caught:
        read(path)
    assert f"{path}, line 2:" in str(caught.value)
    assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "not a list"),
        (["hello"], "not a list"),
        ([], "do not end"),
        ([{"role": "assistant", "content": "b"}], "do not end"),
        ([{"role": "user", "content": "a"}], "do not end"),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "no 'content'"),
        ([{"content": "a"}, {"role": "assistant", "content": "b"}], "no 'role'"),
        ([{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}], "list"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "empty"),
    ],
)
def test_malformed_messages_are_named(written, messages, says):
    with pytest.raises(DataError, match=f"line 2: .*{says}"):
        read(written(talk("a", "b"), {"messages": messages}))


def test_bytes_that_are_not_utf8_are_named(written):
    with pytest.raises(DataError, match=r"line 2: not UTF-8 \(byte 13\)"):
        read(written(raw=GOOD.encode() + b'\n{"prompt": "\xff"}'))


@pytest.mark.parametrize("raw", [b"", b"\n \n"])
def test_an_empty_file_is_refused(written, raw):
    with pytest.raises(DataError, match="no rows"):
        read(written(raw=raw))


def test_no_file(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(NotFound):
            read(path)


# --- tokenising --------------------------------------------------------------------------------------------------


def test_a_completion_follows_its_prompt_and_ends(written, tokenizer):
    examples, cut = encode(read(written({"prompt": "2+2=", "completion": " 4"})), tokenizer, 64)
    assert cut == 0
    [example] = examples
    assert tokenizer.decode(example.prompt) == "2+2=" and tokenizer.decode(example.completion) == " 4</s>"
    assert (example.line, example.targets) == (1, 3)


def test_a_text_is_all_completion(written, tokenizer):
    [[example], _] = encode(read(written({"text": "abc"})), tokenizer, 64)
    assert tokenizer.decode(example.ids) == "abc</s>"
    assert example.start == 0 and example.targets == 3  # b, c and the end; nothing predicts a


def test_begin_token_before_end_token_once(written, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    [[example], _] = encode(read(written({"prompt": "a", "completion": "b"})), tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["<s>", "a", "b", "</s>"]
    [[example], _] = encode(read(written({"text": "ab"})), tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["<s>", "a", "b", "</s>"]


def test_messages_are_what_the_chat_template_makes(written, tokenizer):
    tokenizer.chat_template = TEMPLATE
    row = talk("hi", "hello", "2+2?", "4")
    [[example], _] = encode(read(written(row)), tokenizer, 64)
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    assert list(example.ids) == whole[: len(example.ids)]
    assert tokenizer.decode(example.completion) == "4</s>"
    assert tokenizer.decode(example.prompt) == "<user>hi<assistant>hello</s><user>2+2?<assistant>"


def test_a_conversation_that_the_template_refuses_is_named(written, tokenizer):
    path = written(talk("a", "b"), talk("c", "d"))
    with pytest.raises(UsageError, match="no chat template"):
        encode(read(path), tokenizer, 64)
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'c' %}{{ raise_exception('no c') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(DataError, match="line 2: the chat template refuses it: no c"):
        encode(read(path), tokenizer, 64)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(DataError, match=r"line 1: .* differently"):
        encode(read(path), tokenizer, 64)


def test_long_rows_lose_the_beginning_of_the_prompt_first(written, tokenizer):
    path = written(
        {"prompt": "abcdefghijkl", "completion": "xyz"},
        {"prompt": "abc", "completion": "0123456789"},
        {"prompt": "abc", "completion": "xyz"},
    )
    examples, cut = encode(read(path), tokenizer, 8)
    assert cut == 2
    assert [tokenizer.decode(e.prompt) for e in examples] == ["ijkl", "c", "abc"]
    assert [tokenizer.decode(e.completion) for e in examples] == ["xyz</s>", "0123456", "xyz</s>"]
    [[example], cut] = encode(read(written({"text": "abcdefghijkl"})), tokenizer, 8)
    assert tokenizer.decode(example.ids) == "abcdefgh" and cut == 1


def test_a_cut_prompt_keeps_its_begin_token(written, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    [[example], _] = encode(read(written({"prompt": "abcdefghijkl", "completion": "xyz"})), tokenizer, 8)
    assert tokenizer.decode(example.ids) == "<s>jklxyz</s>"


def test_tokenizers_that_cannot_do_it(written, tokenizer, tiny_model):
    data = read(written(GOOD))
    with pytest.raises(UsageError, match="no tokenizer"):
        encode(data, None, 64)
    with pytest.raises(UsageError, match="length"):
        encode(data, tokenizer, 4)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end token"):
        encode(data, tokenizer, 64)
    with pytest.raises(UsageError, match="token 96"):
        check_vocabulary([Example(1, (5, 96), 1)], tiny_model())
    check_vocabulary([Example(1, (5, 95), 1)], tiny_model())


# --- batching ----------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_left_and_labelled_at_its_end():
    batch = collate([Example(1, (5, 6, 7, 8, 9), 2), Example(2, (10, 11), 1), Example(3, (12, 13, 14), 0)], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 10, 11], [0, 0, 12, 13, 14]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert batch["labels"].tolist() == [[7, 8, 9], [IGNORE, IGNORE, 11], [IGNORE, 13, 14]]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a", "completions": ["b"], "rewards": [1, 2]}, "one length"),
        ({"prompt": "a", "completions": [], "rewards": []}, "one length"),
        ({"prompt": "a", "completions": "b", "rewards": [1]}, "one length"),
        ({"prompt": "a", "completions": ["b", " "], "rewards": [1, 2]}, "empty"),
        ({"prompt": "a", "completions": ["b"], "rewards": [True]}, "sane size"),
        ({"prompt": "a", "completions": ["b"], "rewards": [10**400]}, "sane size"),
        ({"prompt": "a", "completions": ["b"], "rewards": [float("nan")]}, "sane size"),
        ({"prompt": 1, "completions": ["b"], "rewards": [1]}, "not text"),
        ({"completions": ["b"], "rewards": [1]}, "prompt"),
        ({"prompt": "a", "completion": "b", "completions": ["b"], "rewards": [1]}, "in one row"),
    ],
)
def test_scored_rows_that_are_none(row, match, written):
    with pytest.raises(DataError, match=match) as caught:
        read(written(GOOD_SCORED, row))
    assert "line 2" in str(caught.value) and caught.value.hint


def test_scored_rows_in_tokens(written, tokenizer):
    """One example for each completion, in order, those of a row together."""
    data = read(written(GOOD_SCORED, {"prompt": "x", "completions": ["y"], "rewards": [2]}))
    examples, _ = encode(data, tokenizer, 64)
    assert [(e.line, e.reward, e.group) for e in examples] == [(1, 1.0, 0), (1, -0.5, 0), (2, 2.0, 1)]
    assert [tokenizer.decode(e.completion, skip_special_tokens=True) for e in examples] == ["b", "cd", "y"]
    batch = collate(grouped(examples), 0)
    assert batch["group"].tolist() == [0, 0, 1] and batch["reward"].tolist() == [1.0, -0.5, 2.0]
