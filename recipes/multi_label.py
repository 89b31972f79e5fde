"""Several labels a text: which of 27 emotions (or none) does a comment show? BERT with LoRA on GoEmotions.

Needs     1.8 GB on a GPU at its peak (adapters plan): any card of 4 GB
Reaches   macro F1 about 0.46: published for full fine-tuning of BERT base (Demszky et al., 2020); not measured here.
Run       python recipes/multi_label.py          (or accelerate launch ...)
          adapters train recipes/multi_label.yaml
"""

import adapters

RECIPE = adapters.Recipe(
    model="google-bert/bert-base-cased",  # the paper's; capitals tell anger from calm
    data="google-research-datasets/go_emotions:simplified",  # of its two subsets the one with agreed labels
    columns={"label": "labels"},
    strategy="lora",
    output="out/emotions-lora",
    options={
        "problem": "multi-label",  # one yes or no a label, each with a loss of its own
        "threshold": 0.3,  # most labels are rare: at 0.5 hardly one would be given; 0.3 is the paper's
        "r": 16,  # 28 answers need more directions than 2
        "lora_alpha": 32,
        "max_length": 64,  # comments have 3 to 30 words
    },
    train={
        "num_train_epochs": 4,  # the paper's
        "per_device_train_batch_size": 32,
    },
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
