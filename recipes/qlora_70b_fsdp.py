"""QLoRA of a 70B decoder over several GPUs with FSDP: the settings, by transformers' and accelerate's names.

The weights are packed one after the other. What is packed is written once for all processes of a machine, into a
folder that is yours to delete, and each process keeps its share of it. Run in one process the recipe says what it needs
and stops before a byte is read.

Needs     39.9 GB for the packed weights alone (adapters plan), shared by the GPUs: 4 of 24 GB;
          as much of a disk on each machine, and a few GB of main memory a process;
          pip install "holdfast[qlora]"
Reaches   not measured here.
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
    load={
        "dtype": "bfloat16",  # the packed bytes are divided as bytes
        "offload_folder": "out/70b-packed",  # on a local disk
    },
    options={"max_length": 1024, "r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "chat_template": "chatml"},
    train={
        "learning_rate": 1e-4,  # Dettmers et al. (2023) halve it from 33B on
        "lr_scheduler_type": "constant_with_warmup",
        "max_grad_norm": 0.3,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,  # 16 rows a step on all GPUs together: 4 GPUs take 4 each
        "bf16": True,
        "activation_checkpointing": True,  # at the price of gathering each block once more
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],  # one block at a time is gathered
            "reshard_after_forward": True,  # and let go again
        },
    },
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
