"""A tag for each word: persons, places, organisations in news. BERT with LoRA on CoNLL-2003.

Needs     3.0 GB on a GPU at its peak (adapters plan): any card of 4 GB; pip install "holdfast[tagging]"
Reaches   F1 about 0.92 over whole entities: published 92.4 for full fine-tuning of BERT base (Devlin et al., 2019, with
          the document around each sentence, which is not read here); LoRA is not measured here.
Run       python recipes/named_entities.py          (or accelerate launch ...)
          adapters train recipes/named_entities.yaml
"""

import adapters

RECIPE = adapters.Recipe(
    model="google-bert/bert-base-cased",  # names begin with capitals: an uncased model does not see them
    data="tomaarsen/conll2003",  # a copy without loading script, with tokens, ner_tags and the tags' names
    task="token-classification",
    strategy="lora",
    output="out/names-lora",
    options={
        "r": 8,
        "lora_alpha": 16,
        "max_length": 256,  # sentences have 15 words in the mean; hardly one is cut
    },
    train={
        "num_train_epochs": 5,  # Devlin et al. take 2 to 4 with all weights; LoRA learns a little slower
        "per_device_train_batch_size": 16,
    },
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
