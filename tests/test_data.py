"""Splits, fingerprints, token ids, the encoded table, batches: what is cut, and where the supervised tokens
lie."""

import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from sevloss import InputError, data
from sevloss.inputs import tables
from sevloss.models.tiny import tiny_gpt2

# ------------------------------------------------------------------ splits and fingerprints

def test_hash_is_the_one_that_runs_were_made_with():
    """If these numbers change, test rows of old runs become training rows of new ones."""
    assert data.hash_fraction("عندي صداع") == 0.3482244766780674
    assert data.hash_fraction("عندي صداع", "fold") == 0.14413964754150663
    assert data.hash_fraction("chest pain") == 0.5538705950265981
    assert data.complaint_id("عندي صداع") == "59253d42ffbf65d0"


SAME = ["عندي صداع، منذ يومين؟", "عِنْدِي صُدَاعٌ منذ يومين", "  عندي\nصـــداع   منذ\tيومين!!",
        "عندي \u200fصداع. منذ يومين…"]


def test_variants_of_a_complaint_stand_on_the_same_side():
    for i in range(200):
        assert len({data.split_of(f"{text} {i}") for text in SAME}) == 1
    assert len({data.complaint_id(text) for text in SAME}) == 1
    written = ["أعاني من ألم في المعدة وحمى منذ 12 يوما إلى الآن", "اعاني من الم في المعده وحمي منذ ١٢ يوما الي الان",
               "أعانی من آلم فی المعدة وحمى منذ ۱۲ یوما إلى الآن"]  # Farsi ya and digits in the last
    assert len({data.complaint_id(text) for text in written}) == 1
    assert data.complaint_id("Chest PAIN") == data.complaint_id("chest pain")
    assert data.complaint_id("؟؟") != data.complaint_id("!!")  # nothing but punctuation: taken as it is
    assert data.complaint_id("ألم 3") != data.complaint_id("ألم 4")


def test_sides_are_80_10_10_and_do_not_depend_on_the_table():
    pairs = [tables.Pair(i, f"عندي صداع منذ {i} يوم", "", None, None, "", {}) for i in range(5000)]
    sides = data.split_pairs(pairs)
    assert [round(len(side) / 5000, 1) for side in sides.values()] == [0.8, 0.1, 0.1]
    assert sorted(p.row for side in sides.values() for p in side) == list(range(5000))
    assert [p.row for p in data.split_pairs(pairs[::-7])["test"]] == [p.row for p in pairs[::-7]
                                                                      if p in sides["test"]]


def test_fingerprint_sees_every_change():
    pair = tables.Pair(1, "a", "b", 2, (0.0, 0.5, 0.5), "", {})
    changed = [("complaint", "c"), ("response", "c"), ("severity", None), ("probabilities", (0.0, 0.4, 0.6))]
    pairs = [pair, *(pair._replace(**{name: to}) for name, to in changed)]
    assert len({str(data.Fingerprint([p])) for p in pairs}) == 5


# ------------------------------------------------------------------ token ids

def test_prompt():
    """Models fine-tuned with another one would not know it."""
    assert data.PROMPT == "\n{complaint}\n\nالاجابة:\n"


def pair(complaint, response):
    return tables.Pair(0, complaint, response, None, None, "", {})


def encode(pairs, tokenizer, max_length=512, preprocess="none"):
    return data.encode_pairs(pairs, tokenizer, max_length=max_length, eos_id=0, preprocess=preprocess)[0]


@pytest.fixture
def encoded(rows, tiny):
    """Pairs, and their examples."""
    pairs = [pair(row["Question"], row["Answer"]) for row in rows]
    return pairs, encode(pairs, tiny[1])


def example(examples, i):
    """prompt ids, target ids"""
    ids = examples[i].tolist()
    return ids[:examples.first_target[i]], ids[examples.first_target[i]:]


def test_prompt_and_response_are_joined_as_ids(encoded, tiny):
    """So that training and decoding see the same prompt; EOS is a target, or the model would not learn to
    stop."""
    pairs, examples = encoded
    assert len(examples) == len(pairs)
    for i, p in enumerate(pairs):
        prompt, targets = example(examples, i)
        assert prompt == tiny[1].encode(data.PROMPT.format(complaint=p.complaint)).ids
        assert targets == tiny[1].encode(p.response).ids + [0]
        assert examples.target_counts[i] == len(targets)
        assert examples.input_lengths[i] == len(prompt) + len(targets) - 1


def test_prompts_of_training_and_decoding_are_the_same(encoded, tiny):
    pairs, examples = encoded
    assert data.encode_prompts(tiny[1], [p.complaint for p in pairs],
                               512) == ([example(examples, i)[0] for i in range(len(pairs))], 0)


def test_preprocessing(tiny):
    examples = encode([pair("عندي أَلَمٌ!", "خـذ، دواء")], tiny[1], preprocess="arabert")
    plain = encode([pair("عندي ألم !", "خذ ، دواء")], tiny[1])
    assert example(examples, 0) == example(plain, 0)
    assert data.choose_preprocess("auto", "aragpt2-base", {}) == data.choose_preprocess("auto",
                                                                                        "x/bert-base-arabertv02", {}) == "arabert"
    assert data.choose_preprocess("auto", "bloomz-560m", {}) == data.choose_preprocess("none", "aragpt2-base",
                                                                                       {}) == "none"
    assert data.choose_preprocess("auto", "run", {"sevloss": {"preprocess": "arabert"}}) == "arabert"


def test_special_tokens_in_a_text_stay_text(tiny):
    """A post that says <|endoftext|> must not teach the model to stop there."""
    texts = pair("a<|endoftext|>b", "<|endoftext|>")
    prompt, targets = example(encode([texts], tiny[1]), 0)
    assert 0 not in prompt and targets.index(0) == len(targets) - 1 and len(targets) > 2


@pytest.mark.parametrize("length", [20, 40, 100])
def test_truncation_keeps_the_words_after_the_complaint(tiny, length):
    """The prompt gets at least half of the length, the response what the prompt leaves; a cut response has no
    EOS."""
    long, short = "صداع وغثيان " * 60, "صداع"
    tokenizer, ending = tiny[1], data.PROMPT.rpartition("}")[2]
    pairs = [pair(long, short), pair(short, long), pair(long, long)]
    examples, cuts = data.encode_pairs(pairs, tokenizer, max_length=length, eos_id=0, preprocess="none")
    for i, p in enumerate(pairs):
        prompt, targets = example(examples, i)
        text = tokenizer.decode(prompt).strip(" ")
        assert text.endswith(ending) and p.complaint.startswith(text[1:-len(ending)])
        assert len(prompt) + len(targets) <= length
        assert (targets == tokenizer.encode(p.response).ids
                + [0]) if i == 0 else len(prompt) + len(targets) == length and 0 not in targets
        assert len(prompt) > length // 2 - 4 or i == 1  # and no more is cut than needed
    assert data.describe_cuts(cuts, 3,
                              length) == f"  of 3 pairs 2 complaints and 2 responses were cut to fit {length} tokens"


def test_too_short_for_any_prompt(tiny):
    for complaint in ("صداع", ""):  # preprocessing may leave nothing
        with pytest.raises(InputError, match="2 tokens are too few for a prompt: raise --max-length"):
            data.encode_prompts(tiny[1], [complaint], 2)


# ------------------------------------------------------------------ the encoded table

READING = dict(needed=("complaint", "response"), probabilities="required", columns={})
ENCODING = dict(max_length=30, eos_id=0, preprocess="none")
ARRAYS = ("ids", "lengths", "first_target", "probabilities")


@pytest.fixture
def open_table(tiny, write_table, rows, tmp_path, monkeypatch):
    """open_table(read_options=..., encode_options=..., ...) -> (EncodedTable, whether it was made now); in parts of 7
    rows."""
    monkeypatch.setattr(data, "ROWS_AT_ONCE", 7)
    path = write_table("table.jsonl", rows)

    def open_table(tokenizer=tiny[1], read_options=READING, encode_options=ENCODING, validation_rows=5, **others):
        before = set(tmp_path.glob("encoded/*"))
        encoded = data.encoded_table(path, tokenizer, read_options=read_options, encode_options=encode_options,
                                     folder=tmp_path / "encoded",
                                     validation_rows=validation_rows, **others)
        return encoded, len(set(tmp_path.glob("encoded/*")) - before)
    open_table.path = path
    return open_table


def test_encoded_table_holds_what_encoding_gives(open_table, tiny):
    """Made in parts, on disk and memory-mapped: the same arrays as of all rows at once."""
    encoded, made = open_table()
    pairs = tables.read_pairs(open_table.path, needed=("complaint", "response"))
    sides = data.split_pairs(pairs)
    assert made and encoded.fingerprint == str(data.Fingerprint(pairs))
    assert encoded.test_rows == len(sides["test"])
    validation = data.sample_pairs(sides["validation"], 5)
    for found, side in ((encoded.train, sides["train"]), (encoded.validation, validation)):
        examples, _ = data.encode_pairs(side, tiny[1], **ENCODING)
        assert isinstance(found.ids, np.memmap) and len(found) == len(side)
        assert all(np.array_equal(getattr(found, name), getattr(examples, name)) for name in ARRAYS)
    assert open_table(train_rows=20)[0].train.ids.tolist() == encoded.train.ids[:encoded.train.lengths[:20].sum()].tolist()


def test_second_start_reads_no_table_and_says_the_same(open_table, capsys, monkeypatch):
    first, _ = open_table()
    said = capsys.readouterr().out
    monkeypatch.setattr(tables, "usable_pairs", None)
    again, made = open_table()
    assert not made and capsys.readouterr().out == said and "complaint = 'Question'" in said
    assert "were cut" in said
    assert np.array_equal(first.train.ids, again.train.ids) and first.fingerprint == again.fingerprint


def test_encoded_table_is_of_this_table_and_these_arguments(open_table, rows):
    open_table()
    changes = [dict(encode_options=ENCODING | change) for change in (dict(max_length=40), dict(eos_id=1),
                                                               dict(preprocess="arabert"))]
    changes += [dict(read_options=READING | change) for change in (dict(probabilities="optional"),
                                                              dict(columns={"complaint": "Question"}))]
    changes += [dict(train_rows=9), dict(validation_rows=4), dict(supervise="row"),
                dict(tokenizer=tiny_gpt2([row["Answer"] for row in rows], vocab_size=300)[1])]
    assert [open_table(**change)[1] for change in changes] == [1] * len(changes)
    open_table.path.write_text(open_table.path.read_text(encoding="utf-8").replace("أرق", "قلق"),
                               encoding="utf-8")
    assert open_table()[1] == 1 and open_table()[1] == 0


def test_other_prompt_or_split_rule_is_another_encoded_table(open_table, monkeypatch):
    open_table()
    monkeypatch.setattr(data, "PROMPT", "{complaint}\n")
    assert open_table()[1] == 1
    monkeypatch.setattr(data, "SPLIT_RULE", 99)
    assert open_table()[1] == 1


def test_of_two_makers_at_once_the_second_waits(open_table, monkeypatch, tmp_path):
    """And finds the folder made."""
    write = data._write_table
    second = threading.Thread(target=open_table)
    made = []

    def slower(*arguments, **how):
        made.append(arguments)
        second.start()
        second.join(0.2)
        assert second.is_alive()
        return write(*arguments, **how)
    monkeypatch.setattr(data, "_write_table", slower)
    encoded, _ = open_table()
    second.join(20)
    assert len(made) == 1 and not second.is_alive()
    assert len(encoded.train) > 50 and len(list(tmp_path.glob("encoded/*"))) == 1


def test_nothing_is_left_of_a_table_that_cannot_be_read(open_table, tmp_path):
    open_table.path.write_text(open_table.path.read_text(encoding="utf-8") + "{broken", encoding="utf-8")
    with pytest.raises(InputError, match="line 121 cannot be used .JSONDecodeError"):
        open_table()
    assert not list(tmp_path.glob("encoded/*"))


# ------------------------------------------------------------------ batches

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
    batch = data.make_batch(examples, chosen, weight_per_token=np.arange(200) / 8)
    assert str(batch.weights.dtype) == "torch.float32"
    assert batch.weights.tolist() == [chosen[d] / 8 for d in documents]
    assert batch.tokens.tolist() == tokens and batch.lengths == examples.input_lengths[chosen].tolist()
    assert batch.supervised_index.tolist() == supervised
    assert batch.targets.tolist() == targets
    assert batch.sequence.tolist() == documents


def test_batch_says_what_the_table_says(encoded, tiny):
    """Decoded: each document's targets are its answer, and the token before the first one ends the prompt."""
    pairs, examples = encoded
    chosen = [5, 0, 64]
    batch = data.make_batch(examples, chosen)
    begins = np.cumsum([0, *batch.lengths])
    for d, i in enumerate(chosen):
        mine = batch.sequence == d
        assert tiny[1].decode(batch.targets[mine].tolist()).strip() == pairs[i].response
        prompt = batch.tokens[begins[d]:batch.supervised_index[mine][0] + 1].tolist()
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
    assert all(sum(lengths[part]) + lengths[after[0]] > most
               for part, after in zip(parts, parts[1:]))  # as few as that allows
    assert data.micro_batches(lengths, [], most) == []


def test_pack():
    tokens, lengths = data.pack([[1, 2], [3]])
    assert (tokens.tolist(), lengths) == ([1, 2, 3], [2, 1])


def test_a_sample_does_not_depend_on_the_order():
    """Several replies to one complaint share its hash."""
    same = [pair("عندي صداع", response) for response in ("نعم", "لا", "ربما")]
    for size in (1, 2):
        assert data.sample_pairs(same, size) == data.sample_pairs(same[::-1], size)


def test_a_prompt_has_no_end_of_text_behind_it(tiny):
    """Of what a tokenizer adds, what comes before a text stays; a model that saw EOS before each response would
    be taught to begin after it."""
    tokenizer = Tokenizer.from_str(tiny[1].to_str())
    eos = tokenizer.token_to_id("<|endoftext|>")
    plain = data.encode_prompts(tokenizer, ["عندي صداع"], 99)[0][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", eos)])
    for longest in (99, len(plain) - 1):
        prompt, = data.encode_prompts(tokenizer, ["عندي صداع"], longest)[0]
        assert prompt[0] == eos and eos not in prompt[1:] and len(prompt) <= longest
    assert data.encode_prompts(tokenizer, ["عندي صداع"], 99)[0] == [[eos] + plain]


def test_a_validation_table_of_its_own(write_table, rows, tiny, tmp_path, capsys):
    """All of the table is trained on but for complaints that both have; a change of either is noticed."""
    train = write_table("train.jsonl", rows[:60])
    validation = write_table("validation.jsonl", rows[55:90])
    read_options = dict(needed=("complaint", "response"), probabilities="required", columns={})

    def make():
        return data.encoded_table(
            train, tiny[1], read_options=read_options, encode_options=dict(max_length=99, eos_id=0, preprocess="none"),
            validation_options=dict(path=str(validation), needed=read_options["needed"]), folder=tmp_path / "encoded")
    table = make()
    assert (len(table.train), len(table.validation), table.test_rows) == (55, 35, 0)
    assert f"5 rows are not trained on: their complaints are in {validation}" in capsys.readouterr().out
    write_table("validation.jsonl", rows[55:89])
    again = make()
    assert len(again.validation) == 34 and again.fingerprint == table.fingerprint
    assert again.validation_fingerprint != table.validation_fingerprint
