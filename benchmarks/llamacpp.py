"""A Llama written as GGUF, and the logits that llama.cpp itself computes with it and a LoRA file.

llama.cpp comes with the package llama-cpp-python, which is compiled when it is installed; nothing else needs it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from adapters import gguffile


def there() -> bool:
    """Whether llama.cpp can be asked."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def base(net: Any, file: Path) -> None:
    """A transformers LlamaForCausalLM as llama.cpp's own converter lays it out, in float32, without its tokenizer."""
    import gguf

    config = net.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_tokenizer_model("none")  # rows are given as token ids
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in net.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        path, _, last = name.rpartition(".")
        rows = tensor.detach().float()
        if last == "weight" and rows.ndim == 2:
            rows = gguffile.rotated(rows, gguffile.heads("llama", path, config))
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight",)), rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: Path, lora: Path | None, ids: list[int], vocabulary: int) -> Any:
    """llama.cpp's logits at every position, shape (tokens, vocabulary)."""
    import llama_cpp.llama_cpp as lib
    import torch

    hush = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(hush, ctypes.c_void_p(0))
    lib.llama_backend_init()
    net = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(ids))
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = 0
    context = lib.llama_init_from_model(net, settings)
    if not net or not context:
        raise RuntimeError("llama.cpp does not open the model")
    if lora is not None:
        adapter = lib.llama_adapter_lora_init(net, str(lora).encode())
        if not adapter or lib.llama_set_adapters_lora(
            context, (type(adapter) * 1)(adapter), 1, (ctypes.c_float * 1)(1)
        ):
            raise RuntimeError("llama.cpp does not take the adapter")
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    if lib.llama_decode(context, batch):
        raise RuntimeError("llama.cpp does not decode the row")
    pointer = lib.llama_get_logits(context)
    found = torch.tensor([pointer[index] for index in range(len(ids) * vocabulary)]).view(len(ids), vocabulary)
    lib.llama_free(context)
    lib.llama_model_free(net)
    return found
