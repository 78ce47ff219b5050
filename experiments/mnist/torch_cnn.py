"""The same CNN, data and Adam in PyTorch, for compare_torch.py: needs torch and NumPy only.

Written to be as fast as plain PyTorch gets on a CPU: all images in memory as float32, channels
last, no loader, no reading of a number within an epoch.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn


def main(data: str, epochs: int, batch_size: int, seed: int, out: str) -> None:
    """Trains and tests on the four arrays of the .npz file `data`; writes the numbers to `out`."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(7 * 7 * 64, 10),
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    arrays = np.load(data)
    images, test_images = (
        torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).float().div(255).contiguous()
        for name in ("train_images", "test_images")
    )
    labels, test_labels = (
        torch.from_numpy(arrays[name]).long() for name in ("train_labels", "test_labels")
    )

    def train(order: torch.Tensor) -> tuple[float, int]:
        loss_sum, correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for batch in order:
            x = images[batch].contiguous(memory_format=torch.channels_last)
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            correct += (logits.detach().argmax(1) == labels[batch]).sum()
        return loss_sum.item() / len(order), correct.item() / order.numel()

    steps = len(images) // batch_size
    rows = []
    for _ in range(epochs):
        clock = time.perf_counter()
        order = torch.randperm(len(images))[: steps * batch_size].reshape(steps, batch_size)
        loss, accuracy = train(order)
        seconds = time.perf_counter() - clock
        rows.append({"loss": loss, "accuracy": accuracy, "seconds": seconds})
    with torch.no_grad():
        logits = torch.cat([model(x) for x in test_images.split(100)])
    test = {
        "loss": nn.functional.cross_entropy(logits, test_labels).item(),
        "accuracy": (logits.argmax(1) == test_labels).float().mean().item(),
    }
    result = {"test": test, "epochs": rows, "versions": {"torch": torch.__version__}}
    with open(out, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])
