"""Write the folders beside this file: tiny random checkpoints, and what the reference makes of them, for
tests/test_models.py.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/make_models.py

Sizes are odd and every weight is random, biases and norms too, and large, so that a swapped norm, a missing
transpose or the wrong GELU is seen. Weights are stored in fp16 (as real checkpoints often are) and computed
with in fp32. Each document runs alone. expected.safetensors: `tokens`, `lengths`; `hidden.0` (embeddings),
`hidden.1` (after the first block), ... and `final`; `logits` or `class_logits`; `gradient.NAME`; for causal
models `greedy`, the 16 tokens that follow each document.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

try:
    from transformers import (
        AutoModelForCausalLM,
        BertConfig,
        BertForSequenceClassification,
        BloomConfig,
        GPT2Config,
        Lfm2Config,
        LlamaConfig,
        Qwen2Config,
        Qwen3Config,
    )
except ImportError:
    raise SystemExit("The golden files come from the package `transformers`: "
                     "pip install transformers==5.23.0") from None

HERE = Path(__file__).parent
LENGTHS = [7, 3, 11]
NEW_TOKENS = 16


def randomise(named_parameters):
    """normal(0, 0.3), norms around 1; rounded to fp16."""
    with torch.no_grad():
        for name, parameter in named_parameters:
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(((1.0 if norm else 0.0) + 3 * 0.1 * torch.randn(parameter.shape)).half())


def write(name, config, weights, expected, documents):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    weights = {key: tensor.detach().half().contiguous() for key, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    lengths = torch.tensor([len(document) for document in documents])
    expected |= {"tokens": torch.cat(documents), "lengths": lengths}
    expected = {key: tensor.detach().contiguous() for key, tensor in expected.items()}
    save_file(expected, folder / "expected.safetensors")
    print(f"{name}: {sum(path.stat().st_size for path in folder.iterdir()) / 1000:.0f} kB")


def documents(vocab_size, lengths=LENGTHS):
    return [torch.randint(vocab_size, (length,)) for length in lengths]


def causal_expected(run, documents, watched, watched_name):
    """run(document) -> (hidden states [embeddings, after block 1, ...], final, logits), each (T, ...)."""
    runs = [run(document) for document in documents]
    hidden, final, logits = zip(*runs)
    expected = {f"hidden.{i}": torch.cat(states) for i, states in enumerate(zip(*hidden))}
    expected |= {"final": torch.cat(final), "logits": torch.cat(logits)}

    predictions = torch.cat([text_logits[:-1] for text_logits in logits])
    F.cross_entropy(predictions, torch.cat([document[1:] for document in documents])).backward()
    expected[f"gradient.{watched_name}"] = watched.grad

    greedy = []
    with torch.no_grad():
        for document in documents:
            for _ in range(NEW_TOKENS):
                best = run(document)[2][-1].topk(2)
                assert best.values[0] - best.values[1] > 1e-3, "too close to call: take another seed"
                document = torch.cat([document, best.indices[:1]])
            greedy.append(document[-NEW_TOKENS:])
    return expected | {"greedy": torch.stack(greedy)}


def collect_blocks(blocks):
    """A list that every forward pass refills: what goes into the first block, then what comes out of each."""
    states = []

    def after(module, args, output):
        states.append(output[0][0] if isinstance(output, tuple) else output[0])
    blocks[0].register_forward_pre_hook(lambda module, args: states.__setitem__(slice(None), [args[0][0]]))
    for block in blocks:
        block.register_forward_hook(after)
    return states


def make_causal(name, seed, config, watched, lengths=LENGTHS):
    """watched: the parameter whose gradient is stored."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model.named_parameters())
    body, finals = model.base_model, []
    norms = ("ln_f", "norm", "embedding_norm")
    final_norm = next(getattr(body, norm) for norm in norms if hasattr(body, norm))
    final_norm.register_forward_hook(lambda module, args, output: finals.append(output[0]))
    states = collect_blocks(body.h if hasattr(body, "h") else body.layers)

    def run(document):
        logits = model(document[None]).logits[0]
        return list(states), finals.pop(), logits

    texts = documents(config.vocab_size, lengths)
    expected = causal_expected(run, texts, model.get_parameter(watched), watched)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    write(name, stored(config, type(model).__name__), weights, expected, texts)


def make_gpt2(name, seed, **sizes):
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
    make_causal(name, seed, config, "transformer.h.0.attn.c_attn.weight")


def make_bloom(name, seed, **sizes):
    make_causal(name, seed, BloomConfig(**sizes), "transformer.h.0.self_attention.query_key_value.weight")


def make_llama(seed):
    """Llama-3 stretches the long wavelengths, keeps the short ones and blends between: there is one of each
    here."""
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=53, hidden_size=24, intermediate_size=29, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         rms_norm_eps=1e-5, rope_parameters=rope)
    short, middle, long = (2 * math.pi * 100 ** (i / 3) for i in range(3))
    assert short < 64 / 4 < middle < 64 / 1 < long
    make_causal("llama", seed, config, "model.layers.0.self_attn.q_proj.weight")


def make_qwen2(name, seed, **window):
    config = Qwen2Config(vocab_size=53, hidden_size=24, intermediate_size=29, num_hidden_layers=3,
                         num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=29,
                         tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **window)
    make_causal(name, seed, config, "model.layers.0.self_attn.k_proj.weight")


def make_qwen3(seed):
    config = Qwen3Config(vocab_size=53, hidden_size=22, intermediate_size=29, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=29,
                         tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    make_causal("qwen3", seed, config, "model.layers.0.self_attn.q_proj.weight")


def make_lfm2(seed):
    """Texts of 1 and 2 tokens are shorter than the convolution. The inner size: 2/3 of 31, times 1.3, up to a
    multiple of 8, is 32."""
    config = Lfm2Config(vocab_size=53, hidden_size=16, intermediate_size=31, block_multiple_of=8,
                        block_ffn_dim_multiplier=1.3, num_hidden_layers=5,
                        layer_types=["conv", "conv", "full_attention", "conv", "full_attention"],
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=29,
                        rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    make_causal("lfm2", seed, config, "model.layers.0.conv.in_proj.weight", lengths=[7, 1, 11, 2])


def make_aragpt2(seed):
    """AraGPT2-large and -mega have no class in transformers: written out here from their publication, one
    equation a line."""
    torch.manual_seed(seed)
    D, H, layers, inner, V, context, eps = 20, 2, 3, 33, 53, 29, 1e-5
    shapes = {"wte.weight": (V, D), "wpe.weight": (context, D),
              "emb_norm.weight": (D,), "emb_norm.bias": (D,)}
    for i in range(layers):
        shapes |= {f"h.{i}.{key}": shape for key, shape in {
            "ln_1.weight": (D,), "ln_1.bias": (D,),
            "attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,),
            "attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,),
            "mlp.c_fc.weight": (D, inner), "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, D), "mlp.c_proj.bias": (D,)}.items()}
    w = {f"transformer.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    randomise(w.items())
    for tensor in w.values():
        tensor.requires_grad_()

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"transformer.{name}.weight"] + w[f"transformer.{name}.bias"]

    def linear(x, name):
        return x @ w[f"transformer.{name}.weight"] + w[f"transformer.{name}.bias"]

    def attention(h, name):
        q, k, v = linear(h, f"{name}.c_attn").split(D, dim=-1)
        causal, heads = torch.ones(len(h), len(h)).tril().bool(), []
        for part in range(H):
            columns = slice(part * D // H, (part + 1) * D // H)
            scores = q[:, columns] @ k[:, columns].T / math.sqrt(D / H)
            heads.append(scores.masked_fill(~causal, -math.inf).softmax(-1) @ v[:, columns])
        return linear(torch.cat(heads, -1), f"{name}.c_proj")

    def gelu_new(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def run(document):
        embedded = w["transformer.wte.weight"][document] + w["transformer.wpe.weight"][:len(document)]
        h = norm(embedded, "emb_norm")
        states = [h]
        for i in range(layers):
            a = h + attention(h, f"h.{i}.attn")
            m = gelu_new(linear(norm(a, f"h.{i}.ln_1"), f"h.{i}.mlp.c_fc"))
            h = norm(a + linear(m, f"h.{i}.mlp.c_proj"), f"h.{i}.ln_2")
            states.append(h)
        return states, h, h @ w["transformer.wte.weight"].T

    texts = documents(V)
    watched = "transformer.h.0.attn.c_attn.weight"
    expected = causal_expected(run, texts, w[watched], watched)
    config = {"architectures": ["AraGPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": V,
              "n_positions": context, "n_ctx": context, "n_embd": D, "n_layer": layers, "n_head": H,
              "n_inner": inner, "activation_function": "gelu_new", "layer_norm_epsilon": eps,
              "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "bos_token_id": 0, "eos_token_id": 0}
    write("aragpt2", config, w, expected, texts)


def make_bert(seed):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=59, hidden_size=20, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=37, max_position_embeddings=29, pad_token_id=0, num_labels=3,
                        attn_implementation="eager")
    model = BertForSequenceClassification(config).eval()
    randomise(model.named_parameters())
    states, texts = collect_blocks(model.bert.encoder.layer), documents(config.vocab_size)
    runs = [(model(document[None]).logits[0], list(states)) for document in texts]
    class_logits = torch.stack([logits for logits, _ in runs])
    class_logits.square().sum().backward()
    watched = "bert.encoder.layer.0.attention.self.query.weight"
    states_of_blocks = zip(*(states for _, states in runs))
    expected = {f"hidden.{i}": torch.cat(states) for i, states in enumerate(states_of_blocks)}
    expected |= {"class_logits": class_logits, f"gradient.{watched}": model.get_parameter(watched).grad}
    expected["final"] = expected[f"hidden.{config.num_hidden_layers}"].clone()
    write("bert", stored(config, "BertForSequenceClassification"), model.state_dict(), expected, texts)


def stored(config, architecture):
    """config.json as transformers writes it."""
    return json.loads(config.to_json_string()) | {"architectures": [architecture], "dtype": "float16"}


if __name__ == "__main__":
    make_gpt2("gpt2", 0, vocab_size=53, n_positions=29, n_embd=20, n_layer=3, n_head=4, n_inner=37)
    # what other GPT-2 checkpoints set: mGPT's erf GELU, a head of its own, the other scales in attention, the
    # default inner size
    make_gpt2("gpt2_scaled", 0, vocab_size=51, n_positions=31, n_embd=21, n_layer=2, n_head=3,
              activation_function="gelu", scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True,
              tie_word_embeddings=False)
    make_aragpt2(33)
    make_bert(0)
    # six heads: ALiBi's slopes for four, and two of the odd ones between
    make_bloom("bloom", 0, vocab_size=53, hidden_size=18, n_layer=3, n_head=6)
    make_bloom("bloom_post", 0, vocab_size=51, hidden_size=12, n_layer=2, n_head=4,
               apply_residual_connection_post_layernorm=True)
    make_llama(0)
    make_qwen2("qwen2", 0)
    make_qwen2("qwen2_window", 0, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    make_qwen3(1)
    make_lfm2(0)
