"""English to French with an encoder-decoder: T5 with LoRA on sentences from books.

Needs     2.5 GB on a GPU at its peak (adapters plan): any card of 4 GB; pip install "holdfast[translation]"
Reaches   not measured here. Literary sentences are hard for a small model: expect a BLEU below 10. chrF moves earlier.
Run       python recipes/translation.py          (or accelerate launch ...)
          adapters train recipes/translation.yaml
"""

import adapters

RECIPE = adapters.Recipe(
    model="google-t5/t5-small",  # has seen translation: the prefix below calls it up
    data="Helsinki-NLP/opus_books:en-fr",  # 127,085 pairs; validation and test rows are drawn from them
    columns={"source": "en", "target": "fr"},
    task="seq2seq",
    strategy="lora",
    output="out/en-fr-lora",
    options={
        "prefix": "translate English to French: ",  # as T5 was pretrained (Raffel et al., 2020)
        "scores": "translation",  # BLEU and chrF; each evaluation generates, so few rows are kept for it
        "max_length": 128,
        "max_target_length": 128,
        "max_new_tokens": 128,
        "r": 16,
        "lora_alpha": 32,
    },
    train={
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
    },
    validation=0.01,
    test=0.01,
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
