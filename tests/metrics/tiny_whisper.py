"""A Whisper of some weights that says one sentence, whatever it hears."""

from pathlib import Path

import torch

SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
PROMPT = 4  # start, language, task, no timestamps


def save(folder: Path, sentence: str) -> Path:
    """Write the model, its tokenizer and its feature extractor. English is all it knows.

    Its decoder's layers add nothing, and its places outweigh its tokens: what it says at a place is
    the sentence's letter there.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    vocab = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    first_timestamp = max(ids.values()) + 1
    size = first_timestamp + 1501
    config = WhisperConfig(
        vocab_size=size, d_model=64, num_mel_bins=80, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_target_positions=64,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"], suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    decoder = model.model.decoder
    with torch.no_grad():
        for layer in decoder.layers:
            for out in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                out.weight.zero_()
                out.bias.zero_()
        tokens = torch.nn.functional.normalize(torch.randn(size, 64), dim=1)
        decoder.embed_tokens.weight.copy_(tokens)
        decoder.layer_norm.weight.fill_(4)  # sure of itself
        decoder.embed_positions.weight.zero_()
        spoken = [ids["<|endoftext|>"]] * (64 - PROMPT + 1)
        for place, letter in enumerate(sentence):
            spoken[place] = vocab["\u0120" if letter == " " else letter]  # as bytes are written
        decoder.embed_positions.weight[PROMPT - 1 :] = 20 * tokens[spoken]
    model.generation_config = GenerationConfig(
        decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_length=48,
        max_initial_timestamp_index=50,
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder
