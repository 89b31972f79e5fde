"""QLoRA of a 70B decoder over several GPUs with FSDP: the settings, by transformers' and accelerate's names.

This version trains in one process: run as it stands, the recipe says what it needs and stops before a byte is read.
It does not leave the sharding out and try all the same.

Needs     39.9 GB for the packed weights alone (adapters plan), shared by the GPUs: 4 of 24 GB;
          pip install "holdfast[qlora]"
Reaches   not measured here. bitsandbytes' guide to FSDP-QLoRA names two 24 GB GPUs for 70B with offloading to the CPU.
Run       accelerate launch --num_processes 4 recipes/qlora_70b_fsdp.py
          accelerate launch --num_processes 4 -m adapters train recipes/qlora_70b_fsdp.yaml
"""

import adapters

RECIPE = adapters.Recipe(
    model="meta-llama/Llama-3.1-70B",  # gated: accept its licence on the hub, then `hf auth login`
    data="HuggingFaceH4/no_robots",
    columns={"messages": "messages"},
    task="causal-lm",
    strategy="qlora",
    output="out/70b-qlora",
    load={"dtype": "bfloat16"},  # FSDP shards float tensors: the packed bytes travel as bfloat16
    options={"max_length": 1024, "r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "chat_template": "chatml"},
    train={
        "learning_rate": 1e-4,  # Dettmers et al. (2023) halve it from 33B on
        "lr_scheduler_type": "constant_with_warmup",
        "max_grad_norm": 0.3,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,  # 16 rows a step on all GPUs together: 4 GPUs take 4 each
        "bf16": True,
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],  # one block at a time is gathered
            "reshard_after_forward": True,  # and let go again
            "activation_checkpointing": True,  # FSDP's own: the argument of that name would gather a block twice
            "cpu_ram_efficient_loading": True,  # one process reads the checkpoint, the others get their share
            "cpu_offload": False,  # true for two GPUs of 24 GB, at the price of time
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    },
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
