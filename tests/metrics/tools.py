"""The golden file of SIM-o: s3prl's WavLM under F5-TTS's ECAPA_TDNN, at small sizes."""

import json

from safetensors import safe_open

from tests.models.tools import DATA, recipe


def checkpoint(size):
    """The state dict of a size ("large" or "base"), a clip and its embedding."""
    with safe_open(DATA / "sim_o.safetensors", "pt") as file:
        metadata = file.metadata()
        clip, embedding = file.get_tensor("clip"), file.get_tensor(size)
    weights = recipe(dict(json.loads(metadata[size])), int(metadata["weight_seed"]))
    for name, value in weights.items():
        if name.endswith("running_var"):
            weights[name] = 1 + value.abs()
    return weights, clip, embedding
