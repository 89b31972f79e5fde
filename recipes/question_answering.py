"""The piece of a text that answers a question. BERT with LoRA on SQuAD 1.1.

Needs     4.2 GB on a GPU at its peak (adapters plan): any card of 6 GB
Reaches   F1 about 0.88 on the validation rows: published 88.5 (exact match 80.8) for full fine-tuning of BERT base
          (Devlin et al., 2019); LoRA is not measured here.
Run       python recipes/question_answering.py          (or accelerate launch ...)
          adapters train recipes/question_answering.yaml
"""

import adapters

RECIPE = adapters.Recipe(
    model="google-bert/bert-base-uncased",
    data="rajpurkar/squad",  # its validation rows choose the best weights; test rows are drawn, contexts kept apart
    task="question-answering",
    strategy="lora",
    output="out/squad-lora",
    options={
        "r": 8,
        "lora_alpha": 16,
        "max_length": 384,  # windows and stride as BERT's own run has them
        "stride": 128,
    },
    train={
        "num_train_epochs": 2,  # 87,599 questions: BERT's own run takes 2 to 4 epochs
        "per_device_train_batch_size": 16,
    },
    test=0.05,  # 4,000 questions measure F1 to half a point
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
