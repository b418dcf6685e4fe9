"""BERT: an encoder, with a classification head where asked for. Names are those of the checkpoints.

Source: Devlin et al. 2019.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sevloss import InputError
from sevloss.inputs import tables
from sevloss.models.attention import PackedSequences, check_context, embedding


@dataclass
class BertConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1  # attention_probs_dropout_prob is not read: attention.py says why
    classifier_dropout: float | None = None
    position_embedding_type: str = "absolute"
    model_type: str = "bert"
    # Not in config.json: what the checkpoint holds, or the caller asks for.
    pooler: bool = False
    num_labels: int = 0
    pooling: str = "first"
    context = property(lambda config: config.max_position_embeddings)


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens, positions):
        h = self.word_embeddings(tokens) + self.position_embeddings(positions)  # (N, D)
        return self.dropout(self.LayerNorm(h + self.token_type_embeddings.weight[0]))


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, sequences):
        q = self.query(x).unflatten(1, (self.heads, -1))  # (N, H, d)
        k = self.key(x).unflatten(1, (self.heads, -1))
        v = self.value(x).unflatten(1, (self.heads, -1))
        return sequences.attention(q, k, v).flatten(1)  # (N, D)


class Output(nn.Module):
    """dense, dropout, residual, norm: closes both halves of a block."""

    def __init__(self, config, inputs):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    """The norms come last: after attention, and after the feed-forward."""

    def __init__(self, config):
        super().__init__()
        output = Output(config, config.hidden_size)
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Output(config, config.intermediate_size)

    def forward(self, h, sequences):
        attended = self.attention["self"](h, sequences)
        h = self.attention["output"](attended, h)
        inner = F.gelu(self.intermediate["dense"](h))  # (N, inner)
        return self.output(inner, h)


class Bert(nn.Module):
    """tokens (N,), lengths -> hidden states (N, D) after the last block."""

    Config = BertConfig
    prefix = "bert."
    optional_keys = ("bert.pooler.", "classifier.", "mean_classifier.")  # initialised then
    ignored_keys = r"\bcls\.|embeddings\.position_ids$"  # heads of pre-training
    blocks = property(lambda model: model.bert["encoder"]["layer"])

    def __init__(self, config):
        super().__init__()
        if config.hidden_act != "gelu" or config.position_embedding_type != "absolute":
            raise InputError("only BERT with gelu and absolute positions is known; config.json says "
                             f"{config.hidden_act!r} and {config.position_embedding_type!r}")
        self.config = config
        self.architecture = "BertModel"
        layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.bert = nn.ModuleDict({"embeddings": Embeddings(config), "encoder": encoder})
        if config.pooler or (config.num_labels and config.pooling == "first"):
            self.bert["pooler"] = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        if config.num_labels:
            rate = config.classifier_dropout
            self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
            head = nn.Linear(config.hidden_size, config.num_labels)
            # Two names: a class of `transformers` that knows the first alone must not take the second for it.
            if config.pooling == "first":
                self.classifier = head
                self.architecture = "BertForSequenceClassification"
            else:
                self.mean_classifier = head

    @staticmethod
    def normalize(raw, stored):
        """config.json and tensors as stored -> as meant: a pooler and a classifier are built where they are
        stored or num_labels asks for them. A new head reads the first token through the pooler; where none is
        stored, the mean of all tokens, which needs none."""
        for name in list(stored):  # old files
            new_name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            stored[new_name.replace("LayerNorm.beta", "LayerNorm.bias")] = stored.pop(name)
        pooler = any("pooler." in name for name in stored)
        pooling = "first" if pooler else "mean"
        head = [name for name in stored if re.search(r"\b(mean_)?classifier\.", name)]
        if head:
            pooling = "mean" if "mean_classifier." in head[0] else "first"

        # a head that is asked for: the stored one, its classes in our order; for other classes a new one
        names = raw.get("id2label") or {}
        num_labels = raw["num_labels"]
        if head and not num_labels:
            num_labels = len(stored[head[0]]())
        elif num_labels:
            classes = [tables.LABELS.get(tables.plain(names[i])) for i in sorted(names, key=int)]
            rows = [classes.index(i) for i in range(num_labels) if i in classes]
            for name in head:
                tensor = stored.pop(name)()
                if len(rows) == num_labels == len(tensor):
                    stored[name] = tensor[rows].detach
                else:
                    pooling = "first" if pooler else "mean"
        return {**raw, "num_labels": num_labels or 0, "pooler": pooler, "pooling": pooling}

    def forward(self, tokens, lengths):
        return self.hidden_states(tokens, lengths, self.config.num_hidden_layers)

    def hidden_states(self, tokens, lengths, layer):
        """(N, D) after block `layer`, counted from 1; 0 is the embeddings."""
        if not 0 <= layer <= self.config.num_hidden_layers:
            raise InputError(f"block {layer} does not exist: the encoder has {self.config.num_hidden_layers}")
        sequences = PackedSequences(lengths, tokens.device, causal=False)
        check_context(sequences, self.config.context)
        h = self.bert["embeddings"](tokens, sequences.positions)  # (N, D)
        for block in self.blocks[:layer]:
            h = block(h, sequences)
        return h

    def classify(self, tokens, lengths):
        """Class logits (B, num_labels), from each sequence's first token through the tanh pooler, or from the
        mean of its tokens."""
        h = self(tokens, lengths)  # (N, D)
        sequences = PackedSequences(lengths, tokens.device, causal=False)
        if self.config.pooling == "mean":
            sums = h.new_zeros(len(lengths), h.shape[1], dtype=torch.float32)
            sums = sums.index_add(0, sequences.sequence_ids, h.float())  # (B, D)
            return self.mean_classifier(self.dropout(sums / sequences.seqlens[:, None]))
        first = h.index_select(0, sequences.cu_seqlens[:-1])  # (B, D)
        pooled = self.bert["pooler"]["dense"](first).tanh()
        return self.classifier(self.dropout(pooled))
