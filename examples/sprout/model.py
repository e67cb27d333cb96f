"""What sprout is made of: its tokenizer, its architecture and the state that training starts from."""

from itertools import islice

import text
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD = "<|pad|>"
SPECIAL = [PAD, text.END, text.SYSTEM, text.USER, text.ASSISTANT]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def train_tokenizer(vocabulary: int, documents: int, context: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token of its own, so numbers are copied digit by digit."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(islice(text.documents(seed), documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=text.END, additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE, model_max_length=context,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, context: int, seed: int) -> LlamaForCausalLM:
    """A fresh Llama of about 3.4 million parameters."""
    torch.manual_seed(seed)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, rope_theta=100_000.0,
        tie_word_embeddings=True, **ids,
    ))  # fmt: skip
    start_with_copying(model)
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=64)
    return model


@torch.no_grad()
def start_with_copying(model: LlamaForCausalLM) -> None:
    """Writes a copying circuit into the random start, so that training need not discover one.

    Finding "what followed this token last time?" by chance takes a small model millions of tokens. Here
    dimension 0 of an embedding is the same for all tokens, 1 to 64 are empty, the rest tell tokens apart.
    A head of layer 0 looks one position back and notes that token in the empty part; heads of layer 1
    look for the place whose note equals the current token and output what stands there. Everything stays
    trainable.
    """
    width = 64  # of a head
    fast = 4  # so many quickly turning pairs single out the previous position
    model.model.embed_tokens.weight[:, 0] = 0.16
    model.model.embed_tokens.weight[:, 1 : 1 + width] = 0.0
    for layer in model.model.layers:  # quieter layers keep the circuit audible
        layer.self_attn.o_proj.weight *= 0.35
        layer.mlp.down_proj.weight *= 0.35
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    eye, note = torch.eye(width), slice(1, 1 + width)

    for matrix in (first.q_proj, first.k_proj, first.v_proj):
        matrix.weight[:width] = 0.0
    first.o_proj.weight[:, :width] = 0.0
    turn = model.config.rope_parameters["rope_theta"] ** (-torch.arange(fast) / (width / 2))
    first.q_proj.weight[:fast, 0] = 0.9
    first.k_proj.weight[:fast, 0] = 0.9 * turn.cos()
    first.k_proj.weight[width // 2 : width // 2 + fast, 0] = 0.9 * turn.sin()
    first.v_proj.weight[:width, 1 + width : 1 + 2 * width] = eye
    first.o_proj.weight[note, :width] = 0.02 * eye

    # Only pairs that hardly turn over a window are safe for comparing contents.
    slow = torch.arange(width) % (width // 2) >= 14
    match = 1.8 * eye * slow[:, None]
    for group in range(2):  # one matching head in each of the two groups of heads that share keys and values
        shared = slice(group * width, (group + 1) * width)
        head = slice(2 * group * width, (2 * group + 1) * width)
        part = slice(1 + (1 + group) * width, 1 + (2 + group) * width)
        for matrix, rows in ((second.q_proj, head), (second.k_proj, shared), (second.v_proj, shared)):
            matrix.weight[rows] = 0.0
        second.o_proj.weight[:, head] = 0.0
        second.q_proj.weight[head, 1 + width : 1 + 2 * width] = match
        second.k_proj.weight[shared, note] = match
        second.v_proj.weight[shared, part] = eye
        second.o_proj.weight[part, head] = 0.15 * eye
