"""Pretraining: recipes, data, the step, the loop, checkpoints and reports. Import it as `zoo.train`."""

if __name__ == "train":
    raise ImportError("this folder is the package zoo.train: write `from zoo.train import ...`")
