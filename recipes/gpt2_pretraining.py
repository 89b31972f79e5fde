"""Continued pre-training: GPT-2 goes on with plain text, all weights, on WikiText-2.

Needs     9.2 GB on a GPU at its peak (adapters plan): any card of 12 GB
Reaches   a perplexity above 20: published about 20 for the same run where each block goes on from the paragraph before
          it (transformers' run_clm); here every paragraph begins anew, so none sees another. Not measured here.
Run       python recipes/gpt2_pretraining.py          (or accelerate launch ...)
          adapters train recipes/gpt2_pretraining.yaml
          --set data=corpus.txt for text of your own, --set strategy=lora for a file of a few MB
"""

import adapters

RECIPE = adapters.Recipe(
    model="openai-community/gpt2",
    data="Salesforce/wikitext:wikitext-2-raw-v1",  # a paragraph a line; its empty lines are left out and counted
    task="causal-lm",
    strategy="full",  # language itself changes: every weight has its say
    output="out/wikitext-gpt2",
    options={"max_length": 1024},  # plain texts are packed into blocks; none sees another
    train={
        "learning_rate": 5e-5,  # run_clm's, with its 3 epochs and 8 blocks a step
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "weight_decay": 0.0,
    },
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
