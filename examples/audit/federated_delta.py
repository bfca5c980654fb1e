"""Turn what a server of another system holds (arrays before and after) into an observation on disk,
and attack that.
"""

import torch

from attacks import Budget, Knowledge, Observation, Prior, load_observation
from attacks.registry import build

model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
before = {name: p.detach().clone() for name, p in model.named_parameters()}
torch.nn.functional.cross_entropy(model(torch.rand(6, 20)), torch.tensor([0, 0, 1, 2, 2, 2])).backward()
torch.optim.SGD(
    model.parameters(), lr=0.1
).step()  # in Flower: the arrays of `aggregate_fit`, by parameter name
update = {name: p.detach() - before[name] for name, p in model.named_parameters()}
facts = {"learning_rate": 0.1, "local_steps": 1, "optimiser": "sgd", "batch_size": 6}
granted = Knowledge(image_shape=(20,))  # what one input looks like, to probe the model with
Observation(kind="delta", tensors=update, broadcast=before, metadata=facts, knowledge=granted).save("seen")
found = build("label_identity").run(load_observation("seen"), model, Prior(), Budget.quick(), seed=0)
print("labels in the batch:", found.of("label_counts")[0].tolist())
