"""Tables, splits and batches: what is read, what is left out and why, and where the supervised tokens lie."""

import json
from collections import Counter

import numpy as np
import pytest

from sevloss import InputError, data, training_data
from sevloss.models.tiny import tiny_gpt2

BOTH = ("complaint", "response")
ALL = (*BOTH, "severity", "critical")
GOOD = {"Question": "عندي صداع", "Answer": "نم جيدا", "Severity": "neutral", "Non-Critical": "0.2", "Neutral": "0.5", "Critical": "0.3"}


def read(path, needed=BOTH, **columns):
    skipped = data.Skipped()
    return list(data.iterate_pairs(path, needed=needed, columns=columns, skipped=skipped)), skipped


# ------------------------------------------------------------------ tables

@pytest.fixture
def hard_rows(rows):
    """What the formats must not trip over: a comma, quotes, a line break in a cell, white space around it, an emoji, an empty cell."""
    questions = ['سعال، "جاف" ', "أول\nثان", "  👩‍⚕️ عربي\tEnglish", "a,b;c"]
    return [{**row, "Question": question, "Type": "" if i else "أطفال"} for i, (row, question) in enumerate(zip(rows, questions))]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "xlsx", "XLSX"])
def test_same_pairs_from_every_format(write_table, hard_rows, ending):
    path = write_table(f"table.{ending.lower()}", hard_rows)
    pairs, skipped = read(path.rename(path.with_suffix(f".{ending}")), ALL)
    assert [p.complaint for p in pairs] == [row["Question"].strip() for row in hard_rows]
    assert [p.response for p in pairs] == [row["Answer"] for row in hard_rows]
    assert [p.severity for p in pairs] == [0, 1, 2, 0]
    assert pairs[2].probabilities == pytest.approx((0.1, 0.1, 0.8))
    assert [p.specialty for p in pairs] == ["أطفال", "", "", ""]
    assert [p.others for p in pairs] == [{"Type": p.specialty} for p in pairs]
    assert not skipped.rows


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_byte_order_mark_is_no_part_of_the_first_column(write_table, rows, ending):
    """Excel writes one."""
    path = write_table(f"table.{ending}", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(path)[0]) == len(rows)


@pytest.mark.parametrize("complaint, response", [("q_body", "a_body"), ("QUESTION", "answer "), ("السؤال", "الإجابة"), ("الشكوى", "الرد"),
                                                 ("Post", "Plan"), ("complaint", "الاجابة")])
def test_usual_column_names(write_table, complaint, response):
    pairs, _ = read(write_table("table.csv", [{"id": "7", complaint: "صداع", response: "نم"}]))
    assert (pairs[0].complaint, pairs[0].response, pairs[0].others) == ("صداع", "نم", {"id": "7"})


def test_arabic_columns_and_classes(write_table):
    row = {"السؤال": "صداع", "درجة الخطورة": "غير حرج", "غير حرج": "0.7", "متوسط": "0.2", "حرج": "0.1", "التخصص": "باطنية"}
    pair = read(write_table("table.csv", [row]), ("complaint", "severity", "critical"))[0][0]
    assert (pair.severity, pair.probabilities, pair.specialty) == (0, pytest.approx((0.7, 0.2, 0.1)), "باطنية")


@pytest.mark.parametrize("text, index", [("Non-Critical", 0), ("non critical", 0), ("NEUTRAL", 1), ("critical", 2), ("متوسط", 1),
                                         ("حرج", 2)])
def test_spellings_of_the_classes(write_table, text, index):
    assert read(write_table("table.jsonl", [{**GOOD, "Severity": text}]))[0][0].severity == index


def test_columns_of_the_command_line(write_table, capsys):
    """They come before the usual names, and what was taken is printed."""
    path = write_table("table.csv", [{**GOOD, "Text": "حمى", "Reply": "ماء"}])
    pair = read(path, **data.parse_columns(["complaint=Text", "response=Reply"]))[0][0]
    assert (pair.complaint, pair.response) == ("حمى", "ماء")
    assert "complaint = 'Text', response = 'Reply'" in capsys.readouterr().out
    with pytest.raises(InputError, match="has no column 'Txt'; it has Question, "):
        read(path, complaint="Txt")
    with pytest.raises(InputError, match="a role is one of complaint, response"):
        read(path, question="Text")
    for word in ("complaint", "complaint="):
        with pytest.raises(InputError, match="ROLE=COLUMN"):
            data.parse_columns([word])


def test_jsonl_rows_may_lack_fields(tmp_path):
    """Each pair has all the other columns, so that an annotated .csv has the same ones in each line; and broken surrogates are no text."""
    (tmp_path / "table.jsonl").write_text('{"question": "a\\ud83d", "answer": null, "n": 3.0}\n\n{"question": 7, "extra": [1]}\n')
    pairs, _ = read(tmp_path / "table.jsonl", ("complaint",))
    assert [(p.row, p.complaint, p.response, p.others) for p in pairs] == [
        (1, "a?", "", {"n": "3", "extra": ""}), (3, "7", "", {"n": "", "extra": "[1]"})]


BAD = {  # what is changed in a good row -> reason
    "without a response": {"Answer": ""},
    "without a complaint": {"Question": " \t"},
    "without a severity": {"Severity": ""},
    "with a severity other than non-critical, neutral, critical": {"Severity": "عاجل"},
    "without probabilities": {"Non-Critical": "", "Neutral": "", "Critical": ""},
    "with a probability that is no number": {"Neutral": "40%"},
    "with a probability that is negative or NaN": {"Neutral": "nan"},
    "with probabilities that do not sum to 1": {"Neutral": "0.6"},
}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "tsv", "xlsx"])
def test_bad_rows_are_counted_by_reason(write_table, ending):
    """With the numbers that an editor or spreadsheet shows; the header is row 1, and .jsonl has none."""
    path = write_table(f"table.{ending}", [GOOD] + [{**GOOD, **change} for change in BAD.values()] + [{**GOOD, "Neutral": "-0.5"}])
    pairs, skipped = read(path, ALL)
    first = 1 if ending == "jsonl" else 2
    expected = {reason: [first + i] for i, reason in enumerate(BAD, 1)}
    expected["with a probability that is negative or NaN"].append(first + len(BAD) + 1)
    assert [p.row for p in pairs] == [first]
    assert skipped.rows == expected


def test_row_numbers_where_cells_have_several_lines(write_table, hard_rows):
    assert [p.row for p in read(write_table("table.csv", hard_rows))[0]] == [2, 3, 5, 6]


def test_cells_beyond_the_header(tmp_path):
    """They shift the others, so the row cannot be trusted; missing cells at the end are empty, and so are surplus empty ones fine."""
    (tmp_path / "table.csv").write_text("question,answer,type\na,b,c,d\na,b\na,b,c,,\n")
    pairs, skipped = read(tmp_path / "table.csv")
    assert [(p.row, p.specialty) for p in pairs] == [(3, ""), (4, "c")]
    assert skipped.rows == {"with more cells than the header": [2]}


def test_what_was_left_out_is_printed(write_table, capsys):
    data.read_pairs(write_table("table.jsonl", [{"question": "a", "answer": "b" if i == 2000 else ""} for i in range(2002)]), needed=BOTH)
    assert "left out 2,001 rows: 2,001 without a response (row 1, 2, 3, 4, 5, ...)" in capsys.readouterr().out


def test_probabilities_are_made_to_sum_to_1(write_table):
    """Three values rounded to two decimals need not."""
    row = {**GOOD, "Non-Critical": "0.33", "Neutral": "0.33", "Critical": "0.33"}
    assert read(write_table("table.csv", [row]))[0][0].probabilities == pytest.approx((1 / 3,) * 3)


BROKEN = {  # file -> (content, message)
    "missing.csv": (None, "no such file"),
    "table.parquet": (b"PAR1", "a table is one of .jsonl, .csv, .tsv, .xlsx, not .parquet"),
    "table": (b"question,answer", "not a file without an ending"),
    "empty.csv": (b"", "has no rows"),
    "header.csv": (b"question,answer\n", "has no rows"),
    "columns.csv": (b"q1,answer\na,b\n", "no column for the complaint; it has q1, answer. Name one: --columns complaint=COLUMN"),
    "all.csv": (b"title\na,b\nc,d\n", "all rows have more cells than the header"),
    "two_of_three.csv": (b"question,answer,neutral,critical\na,b,1,0\n", "some but not all of the columns non_critical, neutral, critical"),
    "encoding.csv": ("question,answer\nصداع,نم\n".encode("cp1256"), "is not UTF-8 .byte 16 of a block is 0xd5.: .* iconv -f WINDOWS-1256"),
    "encoding.jsonl": ('{"question": "صداع"}'.encode("cp1256"), "is not UTF-8"),
    "line.jsonl": (b'{"question": "a", "answer": "b"}\n{"question": "a"\n', "line 2 is not JSON"),
    "list.jsonl": (b"[1, 2]\n", "line 1 is not a JSON object"),
    "workbook.xlsx": (b"no zip", "cannot be read as an Excel workbook"),
    "quote.csv": (b'question,answer\na,b\n"c,d\ne,f\n', "near line 4: .*; quote marks inside a cell must be doubled"),
    "unusable.csv": (b"question,answer\na,\n,b\n", "no usable row; left out 2 rows: 1 without a response .row 2.; 1 without a complaint"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_used(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        data.read_pairs(tmp_path / name, needed=BOTH)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_no_probabilities(write_table):
    with pytest.raises(InputError, match="no severity probabilities: give --classifier RUN, or --weighting none"):
        read(write_table("table.csv", [{"question": "a", "answer": "b"}]), (*BOTH, "critical"))


# ------------------------------------------------------------------ splits

def test_hash_is_the_one_that_runs_were_made_with():
    """If these numbers change, test rows of old runs become training rows of new ones."""
    assert data.fraction("عندي صداع") == 0.3482244766780674
    assert data.fraction("عندي صداع", "fold") == 0.14413964754150663
    assert data.fraction("chest pain") == 0.5538705950265981
    assert data.key("عندي صداع") == "59253d42ffbf65d0"


SAME = ["عندي صداع، منذ يومين؟", "عِنْدِي صُدَاعٌ منذ يومين", "  عندي\nصـــداع   منذ\tيومين!!", "عندي \u200fصداع. منذ يومين…"]


def test_variants_of_a_complaint_stand_on_the_same_side():
    for i in range(200):
        assert len({data.split_of(f"{text} {i}") for text in SAME}) == 1
    assert len({data.key(text) for text in SAME}) == 1
    assert data.key("Chest PAIN") == data.key("chest pain")
    assert data.key("؟؟") != data.key("!!")  # nothing but punctuation: taken as it is
    assert data.key("ألم 3") != data.key("ألم 4")


def test_sides_are_80_10_10_and_do_not_depend_on_the_table():
    pairs = [data.Pair(i, f"عندي صداع منذ {i} يوم", "", None, None, "", {}) for i in range(5000)]
    sides = data.split_pairs(pairs)
    assert [round(len(side) / 5000, 1) for side in sides.values()] == [0.8, 0.1, 0.1]
    assert sorted(p.row for side in sides.values() for p in side) == list(range(5000))
    assert [p.row for p in data.split_pairs(pairs[::-7])["test"]] == [p.row for p in pairs[::-7] if p in sides["test"]]


def test_fingerprint_sees_every_change():
    pair = data.Pair(1, "a", "b", 2, (0.0, 0.5, 0.5), "", {})
    changed = [("complaint", "c"), ("response", "c"), ("severity", None), ("probabilities", (0.0, 0.4, 0.6))]
    pairs = [pair, *(data.Pair(**{**vars(pair), name: to}) for name, to in changed)]
    assert len({str(data.Fingerprint([p])) for p in pairs}) == 5


# ------------------------------------------------------------------ token ids

def test_prompt():
    """Models fine-tuned with another one would not know it."""
    assert data.PROMPT == "\n{complaint}\n\nالاجابة:\n"


def pair(complaint, response):
    return data.Pair(0, complaint, response, None, None, "", {})


@pytest.fixture
def encoded(rows, tiny):
    """Pairs, and their examples."""
    pairs = [pair(row["Question"], row["Answer"]) for row in rows]
    return pairs, data.encode_pairs(pairs, tiny[1], max_length=512, eos_id=0, preprocess="none")


def example(examples, i):
    """prompt ids, target ids"""
    ids = examples.ids[examples.starts[i]:examples.starts[i + 1]].tolist()
    return ids[:examples.first_target[i]], ids[examples.first_target[i]:]


def test_prompt_and_response_are_joined_as_ids(encoded, tiny):
    """So that training and decoding see the same prompt; EOS is a target, or the model would not learn to stop."""
    pairs, examples = encoded
    assert len(examples) == len(pairs)
    for i, p in enumerate(pairs):
        prompt, targets = example(examples, i)
        assert prompt == tiny[1].encode(data.PROMPT.format(complaint=p.complaint)).ids
        assert targets == tiny[1].encode(p.response).ids + [0]
        assert examples.targets[i] == len(targets) and examples.inputs[i] == len(prompt) + len(targets) - 1


def test_prompts_of_training_and_decoding_are_the_same(encoded, tiny):
    pairs, examples = encoded
    assert data.encode_prompts(tiny[1], [p.complaint for p in pairs], 512) == ([example(examples, i)[0] for i in range(len(pairs))], 0)


def test_preprocessing(tiny):
    examples = data.encode_pairs([pair("عندي أَلَمٌ!", "خـذ، دواء")], tiny[1], max_length=512, eos_id=0, preprocess="arabert")
    plain = data.encode_pairs([pair("عندي ألم !", "خذ ، دواء")], tiny[1], max_length=512, eos_id=0, preprocess="none")
    assert example(examples, 0) == example(plain, 0)
    assert data.choose_preprocess("auto", "aragpt2-base", {}) == data.choose_preprocess("auto", "x/bert-base-arabertv02", {}) == "arabert"
    assert data.choose_preprocess("auto", "bloomz-560m", {}) == data.choose_preprocess("none", "aragpt2-base", {}) == "none"
    assert data.choose_preprocess("auto", "run", {"sevloss": {"preprocess": "arabert"}}) == "arabert"


def test_special_tokens_in_a_text_stay_text(tiny):
    """A post that says <|endoftext|> must not teach the model to stop there."""
    texts = pair("a<|endoftext|>b", "<|endoftext|>")
    prompt, targets = example(data.encode_pairs([texts], tiny[1], max_length=512, eos_id=0, preprocess="none"), 0)
    assert 0 not in prompt and targets.index(0) == len(targets) - 1 and len(targets) > 2


@pytest.mark.parametrize("length", [20, 40, 100])
def test_truncation_keeps_the_words_after_the_complaint(tiny, capsys, length):
    """The prompt gets at least half of the length, the response what the prompt leaves; a cut response has no EOS."""
    long, short = "صداع وغثيان " * 60, "صداع"
    tokenizer, ending = tiny[1], data.PROMPT.rpartition("}")[2]
    pairs = [pair(long, short), pair(short, long), pair(long, long)]
    examples = data.encode_pairs(pairs, tokenizer, max_length=length, eos_id=0, preprocess="none")
    for i, p in enumerate(pairs):
        prompt, targets = example(examples, i)
        text = tokenizer.decode(prompt).strip(" ")
        assert text.endswith(ending) and p.complaint.startswith(text[1:-len(ending)])
        assert len(prompt) + len(targets) <= length
        assert (targets == tokenizer.encode(p.response).ids + [0]) if i == 0 else len(prompt) + len(targets) == length and 0 not in targets
        assert len(prompt) > length // 2 - 4 or i == 1  # and no more is cut than needed
    assert f"of 3 pairs 2 complaints and 2 responses were cut to fit {length} tokens" in capsys.readouterr().out


def test_too_short_for_any_prompt(tiny):
    for complaint in ("صداع", ""):  # preprocessing may leave nothing
        with pytest.raises(InputError, match="2 tokens are too few for a prompt: raise --max-length"):
            data.encode_prompts(tiny[1], [complaint], 2)


# ------------------------------------------------------------------ batches

def test_parts_come_in_order(encoded, tiny, monkeypatch):
    """Pairs may come one after the other, and are encoded a part at a time, in a thread of its own."""
    pairs, examples = encoded
    monkeypatch.setattr(data, "ROWS_AT_ONCE", 7)
    parts = data.encode_pairs((pair for pair in pairs), tiny[1], max_length=512, eos_id=0, preprocess="none")
    assert all(np.array_equal(getattr(parts, name), getattr(examples, name)) for name in ("ids", "starts", "first_target"))


def test_an_error_while_pairs_are_read_is_not_lost(encoded, tiny, monkeypatch):
    def broken():
        yield from encoded[0]
        raise InputError("the table ends in the middle of a row")
    monkeypatch.setattr(data, "ROWS_AT_ONCE", 7)
    with pytest.raises(InputError, match="in the middle"):
        data.encode_pairs(broken(), tiny[1], max_length=512, eos_id=0, preprocess="none")


def test_batch_against_a_loop(encoded):
    """Position p of the stream is supervised where the token after p, in the same document, is a target."""
    _, examples = encoded
    chosen = [7, 3, 111, 4]
    tokens, supervised, targets, documents = [], [], [], []
    for d, i in enumerate(chosen):
        prompt, response = example(examples, i)
        ids = prompt + response
        for t in range(1, len(ids)):
            if t >= len(prompt):
                supervised.append(len(tokens))
                targets.append(ids[t])
                documents.append(d)
            tokens.append(ids[t - 1])
    batch = data.make_batch(examples, chosen, weights=np.arange(200) / 8)
    assert str(batch.weights.dtype) == "torch.float32" and batch.weights.tolist() == [chosen[d] / 8 for d in documents]
    assert batch.tokens.tolist() == tokens and batch.lengths == examples.inputs[chosen].tolist()
    assert batch.supervised.tolist() == supervised
    assert batch.targets.tolist() == targets
    assert batch.example.tolist() == documents


def test_batch_says_what_the_table_says(encoded, tiny):
    """Decoded: each document's targets are its answer, and the token before the first one ends the prompt."""
    pairs, examples = encoded
    chosen = [5, 0, 64]
    batch = data.make_batch(examples, chosen)
    begins = np.cumsum([0, *batch.lengths])
    for d, i in enumerate(chosen):
        mine = batch.example == d
        assert tiny[1].decode(batch.targets[mine].tolist()).strip() == pairs[i].response
        prompt = batch.tokens[begins[d]:batch.supervised[mine][0] + 1].tolist()
        assert tiny[1].decode(prompt).strip(" ") == data.PROMPT.format(complaint=pairs[i].complaint)


@pytest.mark.parametrize("most", [1, 50, 300, 10 ** 9])
def test_micro_batches(most):
    """Each index once, in order of length, and only a single document may be longer than the limit."""
    lengths = np.random.default_rng(0).integers(1, 120, 60)
    parts = data.micro_batches(lengths, range(5, 60), most)
    flat = [i for part in parts for i in part]
    assert sorted(flat) == list(range(5, 60))
    assert [lengths[i] for i in flat] == sorted(lengths[5:])
    assert all(len(part) == 1 or sum(lengths[part]) <= most for part in parts)
    assert all(sum(lengths[part]) + lengths[after[0]] > most for part, after in zip(parts, parts[1:]))  # as few as that allows
    assert data.micro_batches(lengths, [], most) == []


def test_stream():
    tokens, lengths = data.stream([[1, 2], [3]])
    assert (tokens.tolist(), lengths) == ([1, 2, 3], [2, 1])


def test_sample_is_usable():
    """The embedded default: all rows, each class on each side."""
    pairs = data.read_pairs(data.SAMPLE, needed=(*BOTH, "severity"))
    for side in data.split_pairs(pairs).values():
        assert all(n >= 3 for n in Counter(p.severity for p in side).values()) and {p.severity for p in side} == {0, 1, 2}


def test_a_column_has_one_name_and_one_role(write_table, rows, tmp_path):
    twice = tmp_path / "twice.csv"
    twice.write_text("question,question,answer\nا,ب,ج\n", encoding="utf-8")
    with pytest.raises(InputError, match="two columns called 'question'"):
        read(twice)
    with pytest.raises(InputError, match="gives the column 'Answer' two roles"):
        read(write_table("table.csv", rows[:3]), complaint="Answer")


def test_lists_and_lone_symbols_are_no_text(tmp_path):
    table = tmp_path / "table.jsonl"
    answers = ["نعم", ["نعم", "لا"], {"نعم": 1}, "👍", "\u200b", "؟"]
    table.write_text("".join(json.dumps({"question": "سؤال", "answer": a}) + "\n" for a in answers), encoding="utf-8")
    assert [pair.row for pair in read(table)[0]] == [1]


def test_rows_are_counted_as_rows(write_table, hard_rows, tmp_path):
    for ending in ("jsonl", "csv", "tsv", "xlsx"):
        assert data.count_rows(write_table(f"table.{ending}", hard_rows)) == len(hard_rows)
    late = tmp_path / "late.csv"
    late.write_bytes(b"question,answer\n" + "سؤال,جواب\n".encode() * 9000 + "سؤال,جواب\n".encode("cp1256"))
    with pytest.raises(InputError, match="is not UTF-8"):
        data.count_rows(late)


# ------------------------------------------------------------------ a table made ready once

def test_remembered(tiny, write_table, rows, tmp_path, monkeypatch):
    """The second start reads no table; another table, tokenizer or argument is noticed."""
    tokenizer, made = tiny[1], []
    table = write_table("table.jsonl", rows)
    reading = dict(needed=("complaint", "response", "critical"), columns={}, train_rows=None, validation_rows=5)
    encoding = dict(max_length=60, eos_id=0, preprocess="none")

    def ready(tokenizer=tokenizer, **encoding):
        def make():
            made.append(encoding)
            table_rows = training_data.TrainingRows(table, **reading)
            return training_data.prepare(table_rows, table_rows, tokenizer, data.encode_pairs, **encoding)
        return training_data.remembered(tmp_path / "cache", table, tokenizer, (reading, encoding), make)

    first, again = ready(**encoding), ready(**encoding)
    assert len(made) == 1 and len(first.held_out) == 5
    for one, other in ((first.examples, again.examples), (first.held_out, again.held_out)):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "starts", "first_target"))
    assert np.array_equal(first.probabilities, again.probabilities) and first.probabilities.shape == (len(first.examples), 3)
    assert (first.fingerprint, first.kept) == (again.fingerprint, again.kept)

    ready(**encoding | {"max_length": 40})
    ready(tiny_gpt2([row["Answer"] for row in rows], vocab_size=300)[1], **encoding)
    table.write_text(table.read_text(encoding="utf-8").replace("أرق", "قلق"), encoding="utf-8")
    ready(**encoding)
    monkeypatch.setattr(data.arabic, "__file__", data.__file__)  # stands for changed code
    ready(**encoding)
    assert len(made) == 5
