"""`--ckpt tiny`: a small model with random weights and a vocabulary trained on the data; no download."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sevloss.models import from_scratch

EOS = "<|endoftext|>"
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_gpt2(texts, vocab_size=2000):
    """(GPT-2 of 3 blocks, 192 wide, no dropout; byte-level BPE tokenizer trained on `texts`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS], min_frequency=2,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    eos = tokenizer.token_to_id(EOS)
    model = from_scratch(dict(
        model_type="gpt2", vocab_size=tokenizer.get_vocab_size(), n_positions=512, n_embd=192, n_layer=3,
        n_head=6, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=eos, eos_token_id=eos))
    return model, tokenizer


def tiny_bert(texts, num_labels, vocab_size=2000):
    """(BERT of 2 blocks, 128 wide, no dropout, with a head; WordPiece tokenizer trained on `texts`)."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers letters inside words by chance, and breaks ties by number: given here, it is one
    # vocabulary.
    letters = sorted({letter for text in texts for letter in tokenizer.normalizer.normalize_str(text)})
    given = BERT_SPECIAL + [f"##{letter}" for letter in letters if not letter.isspace()]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=given, min_frequency=2, show_progress=False))
    vocabulary = tokenizer.get_vocab()
    rules = tokenizer.normalizer, tokenizer.pre_tokenizer
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # those letters are not special
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules
    tokenizer.add_special_tokens(BERT_SPECIAL)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")])
    model = from_scratch(dict(
        model_type="bert", vocab_size=tokenizer.get_vocab_size(), hidden_size=128, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=512, max_position_embeddings=512, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=tokenizer.token_to_id("[PAD]"), num_labels=num_labels))
    return model, tokenizer
