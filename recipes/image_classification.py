"""What a picture shows: is a bean leaf healthy, and if not, what has it? ViT with LoRA on 1,034 photographs.

Needs     3.2 GB on a GPU at its peak (adapters plan): any card of 4 GB; pip install "holdfast[vision]"
Reaches   not measured here. There are 128 test pictures: one of them is 0.8 points.
Run       python recipes/image_classification.py          (or accelerate launch ...)
          adapters train recipes/image_classification.yaml
          --set data=pictures/ for folders of your own, one a class
"""

import adapters

RECIPE = adapters.Recipe(
    model="google/vit-base-patch16-224-in21k",  # pretrained on 21,000 classes, without a head
    data="AI-Lab-Makerere/beans",  # train, validation and test
    columns={"label": "labels"},
    task="image-classification",
    strategy="lora",
    output="out/beans-lora",
    options={
        "r": 16,
        "lora_alpha": 16,
        "augment": "standard",  # a leaf is the same leaf mirrored or cropped; not so for digits or letters
    },
    train={
        "num_train_epochs": 10,  # 1,034 pictures are few; patience ends it before
        "per_device_train_batch_size": 16,
        "early_stopping_patience": 3,
    },
)

if __name__ == "__main__":
    adapters.run_recipe(RECIPE)
