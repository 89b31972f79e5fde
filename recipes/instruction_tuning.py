"""A small decoder learns to follow instructions: Qwen2.5 0.5B with LoRA on 15,000 instructions written by people.

Needs     13.8 GB on a GPU at its peak (adapters plan): any card of 16 GB
Reaches   not measured here. Look at the validation perplexity against the untrained one that is printed beside it, and
          at answers: adapters predict out/dolly-lora "..."
Run       python recipes/instruction_tuning.py          (or accelerate launch ...)
          adapters train recipes/instruction_tuning.yaml
"""

import adapters

RECIPE = adapters.Recipe(
    model="Qwen/Qwen2.5-0.5B",  # Apache-2.0; its tokenizer brings a chat template
    data="databricks/databricks-dolly-15k",  # CC-BY-SA-3.0: instruction, context, response
    columns={"input": "context", "output": "response"},  # so the rows are read as alpaca's
    task="causal-lm",
    strategy="lora",
    output="out/dolly-lora",
    load={"dtype": "float32"},  # the checkpoint is bfloat16; in float32 it answers more exactly, for 2 GB
    options={
        "max_length": 1024,  # answers alone are learnt, the prompt is not; longer rows are cut and counted
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    },
    train={
        "learning_rate": 2e-4,  # a chat style is soon learnt, and soon overlearnt
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,  # 16 rows a step
        "bf16": True,  # products alone: a GPU multiplies in bfloat16, weights and moments stay in float32
    },
    validation=0.03,
    test=0.03,
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
