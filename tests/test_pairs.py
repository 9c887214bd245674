"""Preference pairs: the filters, mismatch.json and pairs.jsonl of hand-made shards, and reading every format back."""

import json
from types import SimpleNamespace

import pytest
from test_data import BOS, CHAT, EOS, byte_tokenizer, turn

import common
import models
import pairs
import toy
from common import UserError
from run_folder import Run


def write(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(tmp_path, row, tokenizer):
    [pair] = pairs.read_pairs(write(tmp_path, row), tokenizer)
    return {key: pair[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}


def text_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


# ---------------------------------------------------------------------------------------------------------------------
# Filters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, rejected, kept",
    [
        ([-1.0, -1.0], [-3.0], True),  # mean -1 against -3
        ([-1.0, -1.0], [-1.5], True),  # the sum would say otherwise
        ([-1.0], [-1.0], False),  # equal is not above
        ([-2.0, -4.0], [-2.0, -2.0], False),
    ],
)
def test_keep_teacher_compares_means(chosen, rejected, kept):
    record = {"chosen_teacher_logprobs": chosen, "teacher_logprobs": rejected}
    assert pairs.keep_teacher(record, None, None) is kept


@pytest.mark.parametrize(
    "chosen, rejected, kept",
    [("=1076", "=1075", True), ("=1076", "=1076", False), ("=1", "=2", False), ("=1", "=1076", False), ("", "", False)],
)
def test_keep_correct(chosen, rejected, kept):
    """y+ is right and y- is wrong, given the gold response "9+7+0=16;9+7+1=17;1+8+1=10=1076"."""
    tokenizer = toy.make_tokenizer()
    context = SimpleNamespace(decode_text=lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    record = {"chosen_ids": [*text_ids(tokenizer, chosen), 2], "response_ids": [*text_ids(tokenizer, rejected), 2]}
    prompt = {"gold": toy.solve(199, 877, toy.correct_facts())}
    assert bool(pairs.keep_correct(record, prompt, context)) is kept


def test_filter_of_each_name():
    for name, function in (("all", pairs.keep_all), ("teacher", pairs.keep_teacher), ("correct", pairs.keep_correct)):
        assert pairs.pair_filter(SimpleNamespace(keep=name), None) is function
    assert pairs.keep_all({}, {}, None) is True


# ---------------------------------------------------------------------------------------------------------------------
# OUT/pairs/*.jsonl -> pairs.jsonl and mismatch.json
# ---------------------------------------------------------------------------------------------------------------------


def record(prompt_id, sample_id, status, t_star, margins, chosen_ids=(9, 9, 2), ended=True, chosen_ended=True):
    """A sample whose tokens have these margins; the ids are of no importance."""
    return {
        "prompt_id": prompt_id,
        "sample_id": sample_id,
        "status": status,
        "prompt": f"{prompt_id}:",
        "prompt_ids": [5, prompt_id],
        "ended": ended,
        "t_star": t_star,
        "prefix_len": t_star if t_star >= 0 else len(margins),
        "margin": margins[t_star],  # read by no one today
        "response_ids": [5 + k for k in range(len(margins))],
        "student_logprobs": [-1.0] * len(margins),
        "teacher_logprobs": [-1.0 - m for m in margins],
        "chosen_ids": list(chosen_ids),
        "chosen_teacher_logprobs": [-1.0] * len(chosen_ids),
        "chosen_ended": chosen_ended,
    }


class Batches:
    """As much of data.PromptBatches as `merge_pairs` reads: prompt ids from 2 on."""

    def __init__(self, count, size):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def ids(self, k):
        return range(2 + k * self.size, 2 + (k + 1) * self.size)


@pytest.mark.parametrize("damage", ["a sample is missing", "cut in a line", "another prompt", "not records", "gone"])
def test_damaged_shard_is_named(tmp_path, damage):
    (tmp_path / "pairs").mkdir()
    file, rows = tmp_path / "pairs" / "00000.jsonl", [record(2, i, "untouched", -1, [0.0]) for i in range(3)]
    common.write_jsonl(file, rows)
    run = Run(SimpleNamespace(eta=4.0, samples=3), None, toy.make_tokenizer(), [2], tmp_path)
    pairs.merge_pairs(run, Batches(1, 1), tmp_path)
    whole = file.read_text()
    if damage == "a sample is missing":
        common.write_jsonl(file, rows[:2])
    elif damage == "cut in a line":
        file.write_text(whole[:-20])
    elif damage == "another prompt":
        file.write_text(whole.replace('"prompt_id": 2', '"prompt_id": 9'))
    elif damage == "not records":
        file.write_text("[1]\n" * 3)
    else:
        file.write_text("")
    with pytest.raises(UserError, match=f"^the file is cut or damaged, in {file}, delete it and run again"):
        pairs.merge_pairs(run, Batches(1, 1), tmp_path)
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, []),
        ({"replaced": 9, "samples": 1000}, ["corrects 0.9% of the samples at eta 4.0: eta is too high"]),
        ({"replaced": 10, "samples": 1000}, []),
        ({"replaced": 100}, ["corrects 100.0% of the samples at eta 4.0: eta may be too low"]),
        ({"replaced": 99}, []),
        ({"prompts_with_pairs": 1, "prompts": 20}, ["all 40 pairs come from 1 of 20 prompts"]),
        ({"prompts_with_pairs": 2, "prompts": 20}, []),
        ({"at_length_limit": 51}, ["51 of 100 samples have no end"]),
        ({"chosen_at_length_limit": 21}, ["21 of 40 chosen responses have no end"]),
        ({"chosen_at_length_limit": 20, "at_length_limit": 50}, []),
    ],
)
def test_warnings(changes, words):
    summary = {"eta": 4.0, "samples": 100, "replaced": 50, "pairs": 40, "prompts": 20, "prompts_with_pairs": 10}
    lines = pairs.warnings_of(summary | {"at_length_limit": 0, "chosen_at_length_limit": 0} | changes)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines))


def test_merge_pairs_by_hand(tmp_path):
    """Two shards, two prompts over the limit, six samples, eta 4. A margin of exactly 4 is no mismatch, one of exactly 0.5 is in the bin (0, 0.5]."""
    tokenizer = toy.make_tokenizer()
    shards = {
        "00000": [
            {"prompt_id": 2, "status": "too_long"},
            record(3, 0, "untouched", -1, [0.0, 0.5, 4.0]),
            record(3, 1, "kept", 1, [0.0, 5.0, 6.0], ended=False, chosen_ended=False),
            record(3, 2, "duplicate", 1, [0.0, 5.0, 6.0], ended=False),
        ],
        "00001": [
            record(4, 0, "kept", 0, [4.5]),
            record(4, 1, "identical", 0, [25.0]),
            record(4, 2, "filtered", 2, [-30.0, -9.75, 9.0]),
            {"prompt_id": 5, "status": "too_long"},
        ],
    }
    (tmp_path / "pairs").mkdir()
    for name, rows in shards.items():
        common.write_jsonl(tmp_path / "pairs" / f"{name}.jsonl", rows)
    (tmp_path / "pairs" / ".00002.jsonl.1.partial").write_text('{"left by a killed')
    run = Run(SimpleNamespace(eta=4.0, samples=3), None, tokenizer, [2], tmp_path)
    pairs.merge_pairs(run, Batches(2, 2), tmp_path)

    found = common.read_json(tmp_path / "mismatch.json")
    rates, histogram = found.pop("replacement_rate"), found.pop("margin_histogram")
    assert found == {
        "eta": 4.0,
        "prompts": 2,
        "prompts_over_length": 2,
        "prompts_with_pairs": 2,
        "tokens": 14,
        "samples": 6,
        "untouched": 1,
        "replaced": 5,
        "pairs": 2,
        "dropped": {"identical": 1, "duplicate": 1, "filtered": 1},
        "at_length_limit": 2,
        "chosen_at_length_limit": 1,
        "t_star_histogram": {"0": 2, "1": 2, "2": 1},
        "warnings": [],
    }
    # All margins: 0 0.5 4 | 0 5 6 | 0 5 6 | 4.5 | 25 | -30 -9.75 9
    expected = {"0.5": (8, 6), "3.5": (8, 6), "4.0": (7, 5), "4.5": (6, 4), "5.0": (4, 4), "6.0": (2, 2), "9.0": (1, 1)}
    for eta, (tokens, samples) in expected.items():
        assert rates[eta] == {"samples": pytest.approx(samples / 6), "tokens": pytest.approx(tokens / 14)}, eta
    edges, counts = histogram["edges"], histogram["counts"]
    assert len(counts) == len(edges) + 1 and (edges[0], edges[-1]) == (-10, 20)
    tokens_up_to = {edge: count for edge, count in zip([*edges, "above"], counts) if count}
    assert tokens_up_to == {-10: 1, -9.5: 1, 0: 3, 0.5: 1, 4: 1, 4.5: 1, 5: 2, 6: 2, 9: 1, "above": 1}

    merged = common.read_jsonl(tmp_path / "pairs.jsonl")
    assert [(p["prompt_id"], p["sample_id"], p["prefix_len"], p["margin"]) for p in merged] == [
        (3, 1, 1, 5.0),
        (4, 0, 0, 4.5),
    ]
    assert merged[0]["prompt_ids"] == [5, 3] and merged[0]["prompt"] == "3:"
    assert (merged[0]["chosen"], merged[0]["rejected"]) == ("55", "123")


# ---------------------------------------------------------------------------------------------------------------------
# Reading pairs
# ---------------------------------------------------------------------------------------------------------------------


def test_own_format_is_taken_as_it_is(tmp_path):
    """Ids are used untouched, whatever the text beside them says, and further columns stay."""
    tokenizer = byte_tokenizer()
    row = {"prompt_id": 4, "prompt_ids": [BOS, 9], "chosen_ids": [10, EOS], "rejected_ids": [10, 11], "prefix_len": 1}
    row |= {"prompt": "x", "chosen": "y", "rejected": "y", "tokenizer": models.tokenizer_fingerprint(tokenizer)}
    assert pairs.read_pairs(write(tmp_path, row), tokenizer) == [row]
    del row["tokenizer"]
    assert pairs.read_pairs(write(tmp_path, row), tokenizer) == [row], "a fingerprint is not obligatory"


def test_order_and_number_of_rows(tmp_path):
    rows = [{"prompt_ids": [9], "chosen_ids": [10 + k], "rejected_ids": [9]} for k in range(5)]
    assert pairs.read_pairs(write(tmp_path, *rows), byte_tokenizer()) == rows
    assert pairs.read_pairs(write(tmp_path), byte_tokenizer()) == []


@pytest.mark.parametrize("add_bos", [True, False], ids=["tokenizer adds bos", "tokenizer adds none"])
@pytest.mark.parametrize("written", ["", "<s>"], ids=["no bos in the text", "bos in the text"])
def test_trl_text_format(tmp_path, add_bos, written):
    """Prompt with one bos if the tokenizer adds it or the text has it; responses without bos, closed by one eos."""
    tokenizer = byte_tokenizer(add_bos)
    row = {"prompt": f"{written}Wie viel? ", "chosen": "é 5", "rejected": ""}
    bos = [BOS] if add_bos or written else []
    assert read_one(tmp_path, row, tokenizer) == {
        "prompt_ids": bos + text_ids(tokenizer, "Wie viel? "),
        "chosen_ids": [*text_ids(tokenizer, "é 5"), EOS],
        "rejected_ids": [EOS],
    }


def test_text_of_our_own_pairs_gives_the_same_prompt(tmp_path):
    """The text columns of OUT/pairs.jsonl are a TRL data set: read as such, the prompt's ids are those beside them."""
    tokenizer = byte_tokenizer()
    ids = [BOS, *text_ids(tokenizer, "Q:")]
    row = {"prompt": tokenizer.decode(ids), "chosen": "a", "rejected": "b"}
    assert read_one(tmp_path, row, tokenizer)["prompt_ids"] == ids


ASK, GOOD, BAD, SYSTEM = turn("user", "Q"), turn("assistant", "good"), turn("assistant", "bad"), turn("system", "S")
TEMPLATE = CHAT.replace("{% endfor %}", "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}")


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, "<s>[user]Q[assistant]"),
        ({"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]}, "<s>[system]S[user]Q[assistant]"),
        ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, "<s>[user]Q[assistant]"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "<s>[user]Q[assistant]"),
        ({"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "<s>[user]Q[assistant]"),
        (
            {"chosen": [SYSTEM, ASK, GOOD, ASK, GOOD], "rejected": [SYSTEM, ASK, GOOD, ASK, BAD]},
            "<s>[system]S[user]Q[assistant]good</s>[user]Q[assistant]",
        ),
        ({"prompt": "Q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "<s>[user]Q[assistant]"),
    ],
    ids=[
        "prompt as messages",
        "system turn",
        "prompt as text",
        "no prompt",
        "null prompt",
        "no prompt, several turns",
        "prompt as text and in both conversations (UltraFeedback)",
    ],
)
def test_conversational_format(tmp_path, row, prompt):
    """The chat template decides where the response begins; bos once; what both conversations begin with is the prompt."""
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    assert read_one(tmp_path, row, tokenizer) == {
        "prompt_ids": text_ids(tokenizer, prompt),
        "chosen_ids": text_ids(tokenizer, "good</s>"),
        "rejected_ids": text_ids(tokenizer, "bad</s>"),
    }


def test_template_whose_prompt_is_not_how_the_conversation_begins(tmp_path):
    """Qwen3 style: the generation prompt opens an empty thought that a finished turn does not have. Where the response
    begins is then unknown, and taking the whole conversation for it would train on the prompt."""
    tokenizer = byte_tokenizer(
        chat_template=TEMPLATE.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")
    )
    with pytest.raises(UserError, match="chat template"):
        pairs.read_pairs(write(tmp_path, {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}), tokenizer)


def test_date_in_a_chat_template_is_pinned(tmp_path):
    """As for prompts: a run taken up tomorrow must see today's ids."""
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = byte_tokenizer(chat_template=dated + "{{ date_string }}" + TEMPLATE)
    row = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
    prompt_ids = read_one(tmp_path, row, tokenizer)["prompt_ids"]
    assert tokenizer.decode(prompt_ids) == "26 Jul 2024<s>[user]Q[assistant]"


def test_vocabulary_is_hashed_once(tmp_path, monkeypatch):
    """A fingerprint sorts and hashes the vocabulary: 0.2 s for 152k tokens. Once a file, not once a line."""
    tokenizer, hashed, fingerprint = byte_tokenizer(), [], models.tokenizer_fingerprint
    monkeypatch.setattr(models, "tokenizer_fingerprint", lambda t: hashed.append(t) or fingerprint(t))
    row = {"prompt_ids": [9], "chosen_ids": [10], "rejected_ids": [11], "tokenizer": fingerprint(tokenizer)}
    assert len(pairs.read_pairs(write(tmp_path, *[row] * 20), tokenizer)) == 20
    assert len(hashed) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------------------------

IDS = {"prompt_ids": [9], "chosen_ids": [10], "rejected_ids": [11]}  # a good row


@pytest.mark.parametrize("key", ["prompt_ids", "chosen_ids", "rejected_ids"])
@pytest.mark.parametrize("value", [[258], [9, 258], [-1], [1.5], ["9"], "9", None, 9, [[9]]], ids=str)
def test_ids_out_of_range_are_refused(tmp_path, key, value):
    """The tokenizer has 258 tokens: 256 bytes and two specials."""
    path = write(tmp_path, IDS, {**IDS, key: value})
    with pytest.raises(UserError) as error:
        pairs.read_pairs(path, byte_tokenizer())
    expected = f"{key} is not a list of ids below 258, in {path} line 2, use the pairs' own tokenizer"
    assert str(error.value) == expected


def test_highest_id_is_allowed(tmp_path):
    row = {**IDS, "chosen_ids": [257]}
    assert pairs.read_pairs(write(tmp_path, row), byte_tokenizer()) == [row]


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    ours, other = models.tokenizer_fingerprint(byte_tokenizer()), models.tokenizer_fingerprint(toy.make_tokenizer())
    path = write(tmp_path, {**IDS, "tokenizer": ours}, {**IDS, "tokenizer": other})
    with pytest.raises(UserError) as error:
        pairs.read_pairs(path, byte_tokenizer())
    where = f"in {path} line 2"
    assert str(error.value) == (
        f"the ids were made with another tokenizer, {where}, use the model that the pairs were made with"
    )


def test_fingerprint_is_of_the_vocabulary():
    """Equal for equal vocabularies, whatever the template; different when two tokens are swapped or one is added."""
    one, same, more = byte_tokenizer(), byte_tokenizer(add_bos=False, chat_template=CHAT), byte_tokenizer()
    more.add_tokens(["<new>"])
    assert models.tokenizer_fingerprint(one) == models.tokenizer_fingerprint(same)
    assert len({models.tokenizer_fingerprint(t) for t in (one, more, toy.make_tokenizer())}) == 3
    swapped = SimpleNamespace(get_vocab=lambda: {"a": 1, "b": 0})
    plain = SimpleNamespace(get_vocab=lambda: {"b": 1, "a": 0})
    assert models.tokenizer_fingerprint(swapped) != models.tokenizer_fingerprint(plain)
    assert len(models.tokenizer_fingerprint(one)) == 16


COLUMNS = "no columns chosen and rejected, in {}, see the README for the format"
NOT_TEXT = "prompt, chosen and rejected are not all text or all messages, in {}, mend the line"
SAME = "chosen equals rejected, in {}, mend or delete the line"
EMPTY = "prompt_ids is empty, in {}, mend or delete the line"


@pytest.mark.parametrize(
    "row, expected",
    [
        ([1], COLUMNS),
        ("text", COLUMNS),
        (None, COLUMNS),
        ({}, COLUMNS),
        ({"prompt": "a", "chosen": "b"}, COLUMNS),
        ({"prompt_ids": [9], "chosen_ids": [10]}, COLUMNS),
        ({"chosen": "b", "rejected": "c"}, NOT_TEXT),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, NOT_TEXT),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, NOT_TEXT),
        ({"prompt": "a", "chosen": "b", "rejected": None}, NOT_TEXT),
        ({"prompt": "a", "chosen": [GOOD], "rejected": "c"}, NOT_TEXT),
        ({"prompt": [ASK], "chosen": "b", "rejected": "c"}, NOT_TEXT),
        ({"prompt": [ASK], "chosen": ["b"], "rejected": ["c"]}, NOT_TEXT),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, SAME),
        ({**IDS, "prompt_ids": []}, EMPTY),
        ({**IDS, "chosen_ids": [11]}, SAME),
    ],
    ids=lambda value: json.dumps(value) if not isinstance(value, str) or value == "text" else "",
)
def test_rows_that_are_no_pair(tmp_path, row, expected):
    path = write(tmp_path, IDS, row)
    with pytest.raises(UserError) as error:
        pairs.read_pairs(path, byte_tokenizer(chat_template=TEMPLATE))
    assert str(error.value) == expected.format(f"{path} line 2")


@pytest.mark.parametrize("key", ["chosen_ids", "rejected_ids"])
def test_empty_responses_are_refused(tmp_path, key):
    """A response of no token has no mean log-prob (--logprobs mean would be 0/0); even an empty answer has its eos."""
    with pytest.raises(UserError, match="empty"):
        pairs.read_pairs(write(tmp_path, {**IDS, key: []}), byte_tokenizer())


def test_conversation_without_template_is_refused(tmp_path):
    path = write(tmp_path, {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]})
    with pytest.raises(UserError) as error:
        pairs.read_pairs(path, byte_tokenizer())
    where = f"in {path} line 1"
    assert str(error.value) == f"the pair is a conversation, the tokenizer has no chat template, {where}, give text"


def test_conversations_that_share_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="prompt"):
        pairs.read_pairs(write(tmp_path, {"chosen": [GOOD], "rejected": [BAD]}), byte_tokenizer(chat_template=TEMPLATE))


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"prompt": "a",\n', "not JSON (…), in {} line 1, mend or delete the line"),
        (b"\n", "not JSON (…), in {} line 1, mend or delete the line"),
        (b"\xff\xfe\x00\n", "not JSON (…), in {}…, mend or delete the line"),
    ],
    ids=["cut off", "blank line", "binary"],
)
def test_files_that_are_no_json(tmp_path, content, expected):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        pairs.read_pairs(path, byte_tokenizer())
    start, _, end = expected.format(path).partition("(…)")
    assert str(error.value).startswith(start) and str(error.value).endswith(end.rpartition("…")[2])


@pytest.mark.parametrize("name", ["nope.jsonl", "."])
def test_no_such_file(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(UserError) as error:
        pairs.read_pairs(path, byte_tokenizer())
    assert str(error.value) == f"no pairs file, at {path}, run warmup_distill.py first or check --pairs"
