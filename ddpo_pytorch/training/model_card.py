"""README.md of a checkpoint: a model card with the metadata that the Hugging Face hub reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpo_pytorch.generator.lora import FILE_NAME

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
{base_model}tags:
- ddpo
- reinforcement-learning
- {kind}
---

# DDPO checkpoint, {epoch} epochs

Weights ({kind}) after {epoch} epochs of DDPO, with the reward {reward} and the prompts {prompts}. Their images are
synthetic.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({model})
{load}
```

Trained with [rl4med-ddpo](https://github.com/parhamsaremi/rl4med-ddpo), from the model above{unet_path}.
"""
LOADERS = {
    "lora": 'pipe.load_lora_weights("PATH_OF_THIS_FOLDER")',
    "unet": 'pipe.unet.load_state_dict(safetensors.torch.load_file("unet.safetensors"))',
}


def model_card(settings: Mapping[str, Any], weights_file: str, epoch: int) -> str:
    """Return the card of a checkpoint after `epoch` epochs of a run with this configuration."""
    model, kind = settings["pretrained"]["model"], "lora" if weights_file == FILE_NAME else "unet"
    unet_path = settings["unet_path"]
    on_hub = model.count("/") == 1 and not Path(model).exists()
    return CARD.format(
        base_model=f"base_model: {json.dumps(model)}\n" if on_hub else "",
        kind=kind,
        epoch=epoch,
        reward=settings["reward_fn"],
        prompts=settings["prompt_fn"],
        model=json.dumps(model),
        load=LOADERS[kind],
        unet_path=f", with the UNet of {Path(unet_path).name}" if unet_path else "",
    )
