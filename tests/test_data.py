"""Token ids and batches: what is cut, and where the supervised tokens lie."""

import numpy as np
import pytest

from sevloss import InputError, data
from sevloss.inputs import tables


def test_prompt():
    """Models fine-tuned with another one would not know it."""
    assert data.PROMPT == "\n{complaint}\n\nالاجابة:\n"


def pair(complaint, response):
    return tables.Pair(0, complaint, response, None, None, "", {})


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
        assert examples.target_counts[i] == len(targets) and examples.input_lengths[i] == len(prompt) + len(targets) - 1


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
    assert batch.tokens.tolist() == tokens and batch.lengths == examples.input_lengths[chosen].tolist()
    assert batch.supervised_index.tolist() == supervised
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
    assert all(sum(lengths[part]) + lengths[after[0]] > most for part, after in zip(parts, parts[1:]))  # as few as that allows
    assert data.micro_batches(lengths, [], most) == []


def test_pack():
    tokens, lengths = data.pack([[1, 2], [3]])
    assert (tokens.tolist(), lengths) == ([1, 2, 3], [2, 1])
