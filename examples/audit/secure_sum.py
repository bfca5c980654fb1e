"""A secure sum is one larger batch: its labels are counted for the whole cohort, until noise hides them."""

import torch

from attacks import Budget, Knowledge, Observation, Prior
from attacks.registry import build

model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
clients = [(torch.rand(2, 20), torch.tensor(labels)) for labels in ([0, 1], [1, 1], [3, 0])]
loss = torch.nn.functional.cross_entropy
grads = [torch.autograd.grad(loss(model(x), y), list(model.parameters())) for x, y in clients]
total = {name: sum(parts) for (name, _), *parts in zip(model.named_parameters(), *grads, strict=True)}
facts = {"summand": "gradient", "batch_size": 2, "point": "aggregated"}
granted = Knowledge(image_shape=(20,))
seen = Observation(kind="sum", tensors=total, contributors=3, metadata=facts, knowledge=granted)
for noise in (0.0, 1.0):
    noised = seen.replace_tensors({name: t + noise * torch.randn_like(t) for name, t in seen.tensors.items()})
    found = build("label_identity").run(noised, model, Prior(), Budget.quick(), seed=0)
    print(f"noise {noise}: {found.of('label_counts')[0].tolist()}")
