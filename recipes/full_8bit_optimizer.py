"""Full fine-tuning with an 8-bit optimizer: RoBERTa large, every weight trains, on the sentences of SST-2.

Adam keeps two moments a weight: 8 bytes in float32, 2 in 8 bits. Of 355 million weights that is 2.8 GB against 0.7 GB.

Needs     6.4 GB on a GPU at its peak (adapters plan): any card of 8 GB;
          pip install "holdfast[qlora]" (bitsandbytes has the optimizer)
Reaches   about 96 % accuracy: published 96.4 % on the validation rows for training on all 67,000 phrases (Liu et al.,
          2019). Dettmers et al. (2022) find 8-bit Adam equal to 32-bit on GLUE. Not measured here.
Run       python recipes/full_8bit_optimizer.py          (or accelerate launch ...)
          adapters train recipes/full_8bit_optimizer.yaml
"""

import adapters

RECIPE = adapters.Recipe(
    model="FacebookAI/roberta-large",
    data="SetFit/sst2",  # 6,920 whole sentences, 872 for validation, 1,821 for the test
    columns={"label": "label_text"},  # names instead of 0 and 1
    strategy="full",
    output="out/sst2-full",
    options={"max_length": 128},
    train={
        "optim": "adamw_8bit",
        "learning_rate": 1e-5,  # the lowest of the three that Liu et al. search for the large model
        "warmup_steps": 0.06,  # a share of all steps; theirs
        "weight_decay": 0.1,  # theirs
        "num_train_epochs": 5,
        "per_device_train_batch_size": 16,
        "activation_checkpointing": True,  # a third more time for most of the activations' memory
    },
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
