"""The loss inside others' code: an optimizer step over ragged micro-batches against the formula."""

import importlib.util
import math
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F

from sevloss.models import save_model

EXAMPLES = Path(__file__).parent.parent / "examples"
# of prompt and response; 7, so the last of 4 micro-batches is short
LENGTHS = [(3, 2), (1, 9), (6, 1), (4, 5), (0, 7), (2, 12), (8, 3)]
WEIGHTS = [0.5, 1.5, 1.0, 0.55, 1.45, 0.7, 1.3]


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def token_rows(vocabulary):
    """[(ids, labels)]; one has no prompt, so its first label is a token that no position is scored on."""
    random = Random(0)
    rows = []
    for prompt, response in LENGTHS:
        ids = [random.randrange(1, vocabulary) for _ in range(prompt + response)]
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    return rows


def nll(logits, ids, labels):
    """-log P of each supervised token, one row at a time and without padding."""
    scores = logits(torch.tensor([ids]))[0]  # (T, V)
    supervised = [t for t in range(1, len(ids)) if labels[t] != -100]
    return [scores[t - 1].exp().sum().log() - scores[t - 1, labels[t]] for t in supervised]


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Plain:
    micro_batch = 2

    def __init__(self, *_):
        self.example = load("plain_loop")
        self.rows = token_rows(40)

    def model(self):
        torch.manual_seed(0)
        return self.example.ToyModel(vocabulary=40, width=16)

    def logits(self, model, ids):
        return model(ids)

    def train(self, model, weights, chosen):
        rows = [(*self.rows[i], weights[i]) for i in chosen]
        examples = [tuple(map(torch.tensor, row)) for row in rows]
        starts = range(0, len(examples), self.micro_batch)
        micro_batches = [self.example.collate(examples[i:i + self.micro_batch]) for i in starts]
        self.example.train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), micro_batches)


GPT2 = dict(model_type="gpt2", n_positions=32, n_embd=16, n_layer=2, n_head=2,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
LLAMA = dict(model_type="llama", hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=2, tie_word_embeddings=False)


class Trainer:
    trainer_class = "SeverityTrainer"
    config = GPT2
    patch = staticmethod(lambda trainer: None)  # what a test does to the trainer before it runs

    def __init__(self, folder, *_):
        import transformers
        self.transformers = transformers
        self.example = load("hf_trainer")
        self.folder = folder
        self.rows = token_rows(40)

    def model(self):
        torch.manual_seed(0)
        config = self.transformers.AutoConfig.for_model(
            **self.config, vocab_size=40, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
        return self.transformers.AutoModelForCausalLM.from_config(config)

    def logits(self, model, ids):
        return model.eval()(ids).logits

    def arguments(self, kind, **more):
        settings = dict(
            per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=4,
            num_train_epochs=1, max_grad_norm=0, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, remove_unused_columns=False)
        return kind(str(self.folder), **settings | more)

    def trainer(self, model, weights, chosen, optimizer):
        dataset = []
        for i in chosen:
            ids, labels = self.rows[i]
            dataset.append({"input_ids": ids, "labels": labels, "weight": weights[i]})
        trainer_class = getattr(self.example, self.trainer_class)
        return trainer_class(model, self.arguments(self.transformers.TrainingArguments), self.example.collate,
                             train_dataset=dataset, eval_dataset=dataset, optimizers=(optimizer, None))

    def train(self, model, weights, chosen):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = self.trainer(model, weights, chosen, optimizer)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.patch(trainer)
        assert trainer.train().global_step == 1

    def evaluate(self, model, weights):
        return self.trainer(model, weights, range(7), None).evaluate()["eval_loss"]


class Fused(Trainer):
    """The loss of the hidden states. GPT-2's head is its embedding."""
    trainer_class = "FusedSeverityTrainer"

class FusedLlama(Fused):
    """A head of its own, and a final norm that is an RMSNorm."""
    config = LLAMA


class SFT(Trainer):
    """Real text, which TRL tokenizes itself."""
    trainer_class = "SeveritySFTTrainer"

    def __init__(self, folder, tiny, table):
        import datasets
        import transformers
        import trl
        self.transformers, self.trl, self.datasets = transformers, trl, datasets
        self.example = load("trl_sft")
        self.folder, self.checkpoint = folder, folder / "checkpoint"
        save_model(*tiny, self.checkpoint)
        self.texts = [(f"\n{row['Question']}\n\nالاجابة:\n", " ".join([row["Answer"]] * repeats))
                      for row, repeats in zip(table, (1, 3, 1, 2, 5, 1, 2))]
        tokenizer = tiny[1]
        self.rows = []
        for prompt, response in self.texts:
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            ids = tokenizer.encode(prompt + response, add_special_tokens=False).ids
            assert ids[:len(prompt_ids)] == prompt_ids
            ids.append(tokenizer.token_to_id("<|endoftext|>"))
            self.rows.append((ids, [-100] * len(prompt_ids) + ids[len(prompt_ids):]))

    def model(self):
        return self.transformers.AutoModelForCausalLM.from_pretrained(self.checkpoint)

    def trainer(self, model, weights, chosen, optimizer):
        rows = [dict(zip(("prompt", "completion", "weight"), (*self.texts[i], weights[i]))) for i in chosen]
        dataset = self.datasets.Dataset.from_list(rows)
        args = self.arguments(self.trl.SFTConfig, bf16=False, completion_only_loss=True)
        return self.example.SeveritySFTTrainer(
            model, args, train_dataset=dataset, eval_dataset=dataset, optimizers=(optimizer, None),
            processing_class=self.transformers.AutoTokenizer.from_pretrained(self.checkpoint))


with_transformers = pytest.mark.peers("transformers", "accelerate")
with_trl = pytest.mark.peers("transformers", "accelerate", "datasets", "trl")
TRAINER = pytest.param(Trainer, marks=with_transformers)
FUSED = pytest.param(Fused, marks=with_transformers)
FUSED_LLAMA = pytest.param(FusedLlama, marks=with_transformers)
SFT_TRAINER = pytest.param(SFT, marks=with_trl)
TRAINERS = [TRAINER, FUSED, FUSED_LLAMA, SFT_TRAINER]
of_trainers = pytest.mark.parametrize("example", TRAINERS, indirect=True)


@pytest.fixture(params=[Plain, *TRAINERS])
def example(request, tmp_path, tiny, rows, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return request.param(tmp_path, tiny, rows)


def gradient(example, weights, chosen=range(7)):
    """What one step with learning rate 1 takes from the parameters."""
    model = example.model()
    before = flat(model.parameters())
    example.train(model, weights, chosen)
    return before - flat(model.parameters())


def gradient_by_hand(example, weights):
    """1/n sum_i 1/L_i sum_t w_i (-log P(y_t))"""
    model = example.model()
    total = 0
    for (ids, labels), w in zip(example.rows, weights):
        terms = nll(lambda ids: example.logits(model, ids), ids, labels)
        total = total + w * sum(terms) / len(terms)
    return flat(torch.autograd.grad(total / len(example.rows), list(model.parameters())))


def assert_same(ours, reference):
    __tracebackhide__ = True
    difference = (ours - reference).abs().max() / reference.abs().max()
    assert difference < 2e-6, f"differs by {difference:.1e} of the largest value"


def test_step_over_ragged_micro_batches_is_the_formula(example):
    assert_same(gradient(example, WEIGHTS), gradient_by_hand(example, WEIGHTS))


def test_weights_of_one_are_the_unweighted_loss(example):
    """Against cross_entropy, row by row."""
    model = example.model()
    losses = [F.cross_entropy(example.logits(model, torch.tensor([ids]))[0, :-1], torch.tensor(labels)[1:])
              for ids, labels in example.rows]
    unweighted = torch.autograd.grad(sum(losses) / 7, list(model.parameters()))
    assert_same(gradient(example, [1.0] * 7), flat(unweighted))


def test_severity_is_not_averaged_out(example):
    """Weights turn the gradient; a weight that only scaled it, or met the wrong row, would not do."""
    plain, weighted = gradient(example, [1.0] * 7), gradient(example, WEIGHTS)
    assert F.cosine_similarity(plain, weighted, dim=0) < 0.99
    alone = [0.0] * 7
    alone[5] = 7.0
    ids, labels = example.rows[5]
    model = example.model()
    terms = nll(lambda ids: example.logits(model, ids), ids, labels)
    by_hand = torch.autograd.grad(sum(terms) / len(terms), list(model.parameters()))
    assert_same(gradient(example, alone), flat(by_hand))


def test_plain_loop_gives_the_same_step_however_it_is_cut():
    example = Plain()
    whole = gradient(example, WEIGHTS)
    for size in (1, 3, 7):
        example.micro_batch = size
        assert_same(gradient(example, WEIGHTS), whole)


def test_plain_loop_learns(capsys):
    losses = load("plain_loop").main()
    assert losses[-1] < losses[0] / 5
    assert f"loss {losses[-1]:.3f}" in capsys.readouterr().out


@of_trainers
def test_two_devices_take_the_step_of_one(example):
    """Each counts its own rows; counts and gradients are averaged, as torch.distributed would do."""
    shards, counted = [(0, 2, 5, 6), (1, 3, 4)], []

    def patch(trainer):
        def reduce(count, reduction):
            counted.append((count.item(), reduction))
            return torch.tensor(3.5)
        trainer.accelerator.reduce = reduce
    example.patch = patch
    both = sum(gradient(example, WEIGHTS, chosen=shard) for shard in shards) / 2
    assert_same(both, gradient_by_hand(example, WEIGHTS))
    assert counted == [(4, "mean"), (3, "mean")]


@of_trainers
def test_accumulation_is_not_divided_out_again(example):
    """As Trainer does for a model whose forward takes no loss arguments."""
    example.patch = lambda trainer: setattr(trainer, "model_accepts_loss_kwargs", False)
    assert_same(gradient(example, WEIGHTS), gradient_by_hand(example, WEIGHTS))


@of_trainers
def test_evaluation_is_unweighted_and_a_mean_over_examples(example):
    model = example.model()
    with torch.no_grad():
        terms = [nll(lambda ids: example.logits(model, ids), *row) for row in example.rows]
    expected = sum(sum(t) / len(t) for t in terms) / 7
    assert example.evaluate(model, WEIGHTS) == pytest.approx(expected.item(), rel=1e-6)


@of_trainers
def test_a_dropped_weight_column_is_an_error(example):
    """remove_unused_columns is True by default: the column must not vanish in silence."""
    arguments = example.arguments
    example.arguments = lambda kind, **more: arguments(kind, **more | {"remove_unused_columns": True})
    with pytest.raises(KeyError, match="weight"):
        gradient(example, WEIGHTS)


@with_transformers
def test_fused_holds_no_logits(tmp_path):
    """The head itself is asked for one position a row, in training and in evaluation."""
    example, positions = Fused(tmp_path), []
    model = example.model()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: positions.append(logits.shape[1]))
    example.train(model, WEIGHTS, range(7))
    example.evaluate(model, WEIGHTS)
    assert positions == [1] * 8


@pytest.mark.parametrize("example", [TRAINER, FUSED, SFT_TRAINER], indirect=True)
def test_trainers_run_as_scripts_do(example, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    save_model(*tiny, tmp_path / "small")
    trainer_class = getattr(example.example, example.trainer_class)
    loss = example.example.main(str(tmp_path / "small"), str(tmp_path / "run"), 1, trainer_class)
    assert math.isfinite(loss)
