"""A malicious server reads inputs off a crafted model's answer;
the client's check refuses that model beforehand.
"""

import torch

from attacks import Budget, Observation, Prior
from attacks.inversion.active import craft_imprint
from attacks.registry import build
from defenses.broadcast_check import check_broadcast, layout_of

honest, inputs = torch.nn.Linear(64, 10).eval(), torch.rand(4, 64)
crafted = craft_imprint(honest, torch.rand(500, 64), bins=64)
torch.nn.functional.cross_entropy(crafted(inputs), torch.tensor([0, 1, 2, 3])).backward()
seen = Observation(kind="gradient", tensors={name: p.grad for name, p in crafted.named_parameters()})
found = build("imprint").run(seen, crafted, Prior(), Budget.quick(), seed=0)
near = torch.cdist(torch.stack(found.of("inputs")), inputs).amin(0) < 1e-2
weights = {name: p.detach() for name, p in crafted.named_parameters()}
reasons = check_broadcast(weights, layout_of({name: p.detach() for name, p in honest.named_parameters()}))
print(f"{int(near.sum())} of 4 inputs read;", *reasons, sep="\n")
