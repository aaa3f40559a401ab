"""Makes tests/parity/inception/: images of two sizes, and what pytorch-fid's Inception-v3 makes of them.

    pip install torch torchvision pytorch-fid==0.3.0 && python tests/parity/make_inception.py

Its 22 million weights are drawn by their names (by_name.py), here and by the test, in place of the published ones. The
committed file is of torch 2.13.0 and the torch modules of torchvision 0.29.1.
"""

from pathlib import Path

import numpy as np
import torch
from by_name import tensor
from pytorch_fid import inception
from torchvision.models.inception import Inception3

FOLDER = Path(__file__).parent / "inception"
SIZES = ((16, 24), (310, 299))


def weights() -> dict[str, torch.Tensor]:
    """Of all names that the published file has, in their shapes."""
    shapes = {}
    plain = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name, value in plain.state_dict().items():
        shapes[name] = tuple(value.shape)
    made = {name: torch.tensor(tensor(name, shape)) for name, shape in shapes.items() if "num_batches" not in name}
    return made | {name: torch.tensor(0) for name in shapes if "num_batches" in name}


def main() -> None:
    inception.load_state_dict_from_url = lambda *_, **__: weights()
    model = inception.InceptionV3().eval()
    golden = {}
    for y, x in SIZES:
        pixels = np.random.default_rng(y).integers(0, 256, (2, y, x, 3), np.uint8)
        with torch.no_grad():
            (found,) = model(torch.tensor(pixels).permute(0, 3, 1, 2) / 255)
        golden[f"features_{y}x{x}"] = found[:, :, 0, 0].numpy()
        print(f"{y} x {x}: features of mean {found.mean():.3f} and deviation {found.std():.3f}")
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "golden.npz", **golden)


if __name__ == "__main__":
    main()
