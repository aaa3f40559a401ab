"""What the scripts that make golden files have in common; it stands beside them, and needs torch as they do."""

import torch


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with logits that spread as a trained one's do, and biases and norms that are not all 0 or 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif ".ln_" in name or "norm" in name.lower():
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.2)
    return model
