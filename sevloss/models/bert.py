"""BERT: an encoder, with a classification head where asked for. Names are those of the checkpoints.

Source: Devlin et al. 2019. Embeddings are word + token type 0 + position, then LayerNorm; blocks have their norms last.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sevloss import InputError
from sevloss.models.attention import PackedSequences, check_context


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
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    position_embedding_type: str = "absolute"
    model_type: str = "bert"
    pooler: bool = False  # these three are not in config.json: what the checkpoint holds, or the caller asks for
    num_labels: int = 0
    pooling: str = "first"

    @property
    def context(self):
        return self.max_position_embeddings


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens, positions):
        h = self.word_embeddings(tokens) + self.token_type_embeddings.weight[0] + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(h))  # (N, D)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob

    def forward(self, x, sequences, layer):
        q, k, v = (project(x).unflatten(1, (self.heads, -1)) for project in (self.query, self.key, self.value))  # (N, H, d)
        return sequences.attention(q, k, v, layer, dropout=self.dropout if self.training else 0.0).flatten(1)  # (N, D)


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
    def __init__(self, config):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Output(config, config.hidden_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Output(config, config.intermediate_size)

    def forward(self, h, sequences, layer):
        h = self.attention["output"](self.attention["self"](h, sequences, layer), h)
        return self.output(F.gelu(self.intermediate["dense"](h)), h)


class Bert(nn.Module):
    """tokens (N,), lengths -> hidden states (N, D) after the last block."""

    prefix = "bert."
    optional_keys = ("bert.pooler.", "classifier.", "mean_classifier.")  # initialised then
    ignored_keys = r"^cls\.|embeddings\.position_ids$"
    Config = BertConfig

    def __init__(self, config):
        super().__init__()
        if config.hidden_act != "gelu" or config.position_embedding_type != "absolute":
            raise InputError(f"only BERT with gelu and absolute positions is known; config.json says {config.hidden_act!r} "
                             f"and {config.position_embedding_type!r}")
        if config.hidden_size % config.num_attention_heads:
            raise InputError(f"hidden_size {config.hidden_size} in config.json is not a multiple of num_attention_heads "
                             f"{config.num_attention_heads}")
        self.config = config
        self.bert = nn.ModuleDict({
            "embeddings": Embeddings(config),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])}),
        })
        if config.pooler or (config.num_labels and config.pooling == "first"):
            self.bert["pooler"] = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        if config.num_labels:
            rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
            self.dropout = nn.Dropout(rate)
            # Two names: a class of `transformers` that knows the first alone must not take the second for it.
            self.register_module("classifier" if config.pooling == "first" else "mean_classifier",
                                 nn.Linear(config.hidden_size, config.num_labels))

    @staticmethod
    def normalize_config(raw, names):
        """A pooler and a classifier are built where the checkpoint has them or `num_labels` asks for them. A new head reads the first
        token through the pooler; where the checkpoint has no pooler, the mean of all tokens, which needs none."""
        trained = {"classifier.weight": "first", "mean_classifier.weight": "mean"}
        pooling = next((p for name, p in trained.items() if name in names), None)
        labels = raw.get("num_labels") or (len(raw.get("id2label") or (0, 1)) if pooling else 0)
        pooler = any("pooler." in name for name in names)
        return {**raw, "num_labels": labels, "pooler": pooler, "pooling": pooling or ("first" if pooler else "mean")}

    @property
    def architecture(self):
        return "BertForSequenceClassification" if self.config.num_labels and self.config.pooling == "first" else "BertModel"

    def forward(self, tokens, lengths):
        return self.hidden_states(tokens, lengths, self.config.num_hidden_layers)

    def hidden_states(self, tokens, lengths, layer):
        """(N, D) after block `layer`, counted from 1; 0 is the embeddings."""
        if not 0 <= layer <= self.config.num_hidden_layers:
            raise InputError(f"block {layer} does not exist: the encoder has {self.config.num_hidden_layers}")
        sequences = PackedSequences(lengths, tokens.device, causal=False)
        check_context(sequences, self.config.context)
        h = self.bert["embeddings"](tokens, sequences.positions)
        for i in range(layer):
            h = self.bert["encoder"]["layer"][i](h, sequences, i)
        return h

    def classify(self, tokens, lengths):
        """Class logits (B, num_labels), from each document's first token through the tanh pooler, or from the mean of its tokens."""
        h = self.forward(tokens, lengths)  # (N, D)
        count = torch.tensor(lengths, device=tokens.device)
        if self.config.pooling == "mean":
            document = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), count, output_size=len(tokens))
            sums = h.new_zeros(len(lengths), h.shape[1], dtype=torch.float32).index_add_(0, document, h.float())
            return self.mean_classifier(self.dropout(sums / count[:, None]))
        first = h[count.cumsum(0) - count]  # (B, D)
        return self.classifier(self.dropout(torch.tanh(self.bert["pooler"]["dense"](first))))
