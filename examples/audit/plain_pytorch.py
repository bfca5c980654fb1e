"""Read the inputs of one batch back from its gradient, in plain PyTorch."""

import torch

from attacks import Budget, Knowledge, Observation, Prior
from attacks.registry import build

model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)).eval()
inputs, labels = torch.rand(1, 64), torch.tensor([3])
torch.nn.functional.cross_entropy(model(inputs), labels).backward()
gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
seen = Observation(kind="gradient", tensors=gradient, knowledge=Knowledge(batch_size=1))
found = build("linear_readout").run(seen, model, Prior(), Budget.quick(), seed=0)
print("largest error:", float((found.of("inputs")[0] - inputs[0]).abs().max()))
