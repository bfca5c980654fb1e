"""What a user would write: Flower's simulation, PEFT's adapters, Opacus's hooks; run by
`benchmarks.peer_round` inside an environment that has them. PEER_WORK in the environment names the rows and
what is to be done.

It is given the benefit of every doubt: model and tokenised rows are loaded once a worker, a round is timed
from the moment its messages are made until its mean is taken, and nothing is evaluated.
"""

from __future__ import annotations

import functools
import json
import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from opacus import PrivacyEngine
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

NOISE = 0.5  # what it is does not change the time
client, server = ClientApp(), ServerApp()
seconds: list[float] = []


@functools.cache
def work() -> dict[str, Any]:
    """Return what is to be done."""
    return dict(json.loads(Path(os.environ["PEER_WORK"]).read_text()))


@functools.cache
def model() -> PeftModel:
    """Return the adapted model, once a process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(work()["model"], num_labels=work()["classes"])
    adapter = LoraConfig(
        task_type="SEQ_CLS", r=work()["rank"], lora_alpha=work()["alpha"], target_modules=["query", "value"]
    )
    return get_peft_model(base, adapter)


@functools.cache
def rows(number: int) -> TensorDataset:
    """Return a client's rows, tokenised once."""
    tokenizer = AutoTokenizer.from_pretrained(work()["model"])
    client_rows = work()["clients"][number]
    tokens = tokenizer(
        client_rows["texts"], truncation=True, max_length=work()["length"], padding=True, return_tensors="pt"
    )
    return TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(client_rows["labels"]))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Take the steps of one client."""
    network, own = model(), rows(int(context.node_config["partition-id"]))
    set_peft_model_state_dict(network, message.content["arrays"].to_torch_state_dict())
    network.train()
    loader = DataLoader(own, batch_size=min(work()["batch"], len(own)))
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    private, optimizer, loader = PrivacyEngine().make_private(
        module=network,
        optimizer=torch.optim.SGD(parameters, lr=work()["rate"]),
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=work()["clip"],
    )
    left = work()["steps"]
    while left:
        for tokens, attended, labels in loader:
            optimizer.zero_grad()
            if len(labels):
                loss = private(input_ids=tokens, attention_mask=attended, labels=labels).loss
                loss.backward()
                optimizer.step()
            left -= 1
            if not left:
                break
    arrays = ArrayRecord(get_peft_model_state_dict(private.to_standard_module()))
    metrics = MetricRecord({"num-examples": len(own)})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """Note how long each round takes."""

    began = 0.0

    def configure_train(self, server_round: int, *words: Any) -> Iterable[Message]:
        """Begin a round."""
        self.began = time.perf_counter()
        return super().configure_train(server_round, *words)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """End a round, to which everybody must have answered."""
        answers = list(replies)
        failed = [answer for answer in answers if answer.has_error()]
        if failed or len(answers) != len(work()["clients"]):
            raise RuntimeError(f"{len(answers)} answers, {[answer.error for answer in failed][:1]}")
        mean = super().aggregate_train(server_round, answers)
        seconds.append(time.perf_counter() - self.began)
        return mean


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Take the mean of everybody's adapters, round after round."""
    count = len(work()["clients"])
    strategy = Timed(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count
    )
    arrays = ArrayRecord(get_peft_model_state_dict(model()))
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=work()["rounds"])


def main() -> None:
    """Run the rounds; the last line is their seconds."""
    warnings.simplefilter("ignore")
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=len(work()["clients"]),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": work()["workers"]},
        },
    )
    print(json.dumps(seconds))
