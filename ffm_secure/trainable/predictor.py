"""Answer with a trained model as a run left it: labels, continuations, hidden words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Cells
from ffm_secure.models.backbone import load_backbone
from ffm_secure.models.model_checks import start_token
from ffm_secure.records import ModelExport
from ffm_secure.registry import TASKS
from ffm_secure.tasks import Task, build_task
from ffm_secure.tasks.chat import Turn, end_of_answer, has_template, render_question
from ffm_secure.tasks.encoded import encode_answered, encode_texts
from ffm_secure.trainable import TrainableModel, attach
from ffm_secure.trainable.exports import read_record

NEW_TOKENS = 32  # how far a text is continued
_AT_ONCE = 32
_LONGEST = 10**6  # tokens of a text, for models that know no bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Hold one answer: a label with its probability, a continued text or the answer to a prompt or a chat
    (score None), or a text with its hidden words restored.
    """

    answer: str
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Say how a run built its model: everything `load_backbone` and `attach` need beside the task."""

    name: str
    spec: Mapping[str, Any]
    seed: int
    dtype: str = "float32"
    random_weights: bool = False


class _Columns:
    """Hold texts or pictures as the task wants examples."""

    def __init__(self, columns: Mapping[str, Any], count: int) -> None:
        self.columns, self.count = columns, count

    def __len__(self) -> int:
        return self.count

    def column(self, name: str) -> Cells:
        return self.columns[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    text_columns: tuple[str, ...]
    label_column: str | None
    label_names: tuple[str, ...]
    image_column: str | None = None


class Predictor:
    """A trained model with the task it was trained for; texts and pictures are prepared as in training."""

    def __init__(self, *, trainable: TrainableModel, task: Task, export: ModelExport) -> None:
        self.trainable, self.task, self.export = trainable, task, export

    @classmethod
    def load(cls, folder: Path, source: ModelSource, *, base: Path) -> Predictor:
        """Build the model a run built and put in what it trained.

        Raises:
          ModelError: the folder holds no finished export, or the base is not the one the run started from.
        """
        record = read_record(folder)
        backbone = load_backbone(
            source.name,
            kind=record.task,
            labels=len(record.labels) or None,
            base=base,
            seed=source.seed,
            dtype=source.dtype,
            random_weights=source.random_weights,
            class_text=record.class_text or "{}",
        )
        pictures = record.task.startswith("image")
        data = _Data(text_columns=record.text_columns, label_column="label", label_names=record.labels)
        if pictures:
            data = replace(data, text_columns=(), image_column="picture")
        task = build_task(record.task, backbone=backbone, dataset=data, max_length=record.max_length)
        trainable = attach(backbone, source.spec, task_kind=record.task, seed=source.seed)
        trainable.import_(folder)
        return cls(trainable=trainable, task=task, export=record)

    @property
    def reads(self) -> tuple[str, ...]:
        """Name the columns the model reads; one it writes is none of them."""
        if TASKS.has(self.export.task, "answers"):
            return self.export.text_columns[:-1]
        return self.export.text_columns

    def texts(self, columns: Sequence[Sequence[str]]) -> list[Prediction]:
        """Answer texts, given as one column, or as two for pairs."""
        wanted = len(self.reads)
        if len(columns) != wanted:
            raise ModelError(f"the model reads {wanted} texts a row, these are {len(columns)}")
        if self.export.task == "sequence_to_sequence":
            return [self._write(text) for text in columns[0]]
        if self.export.task == "causal_lm":
            return [self._continue(text) for text in columns[0]]
        named = dict(zip(self.export.text_columns, columns, strict=True))
        if self.export.task == "masked_lm":
            return [self._restore(text) for text in columns[0]]
        return self._classify(named, len(columns[0]))

    def pictures(self, pictures: Sequence[Any]) -> list[Prediction]:
        """Answer pictures uint8 [H, W, 3], each of its own size or all of one."""
        predictions: list[Prediction] = []
        for picture in pictures:
            predictions += self._classify({"picture": np.asarray(picture)[None]}, 1)
        return predictions

    def logits(self, columns: Mapping[str, Any], count: int) -> Tensor:
        """Return the scores of a classifier, float32 [count, labels]."""
        encoded = self.task.encode(_Columns({**columns, "label": np.zeros(count, dtype=np.int64)}, count))
        parts = []
        for start in range(0, count, _AT_ONCE):
            rows = range(start, min(start + _AT_ONCE, count))
            batch = self.task.batch(encoded, rows, device="cpu")
            batch.pop("labels", None)
            with torch.inference_mode():
                parts.append(self.trainable.model(**batch).logits.float())
        return torch.cat(parts)

    def _classify(self, columns: Mapping[str, Any], count: int) -> list[Prediction]:
        chances = self.logits(columns, count).softmax(dim=1)
        scores, places = chances.max(dim=1)
        return [
            Prediction(answer=self.export.labels[place], score=score)
            for place, score in zip(places.tolist(), scores.tolist(), strict=True)
        ]

    def _token_scores(self, tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            scores: Tensor = self.trainable.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[
                0
            ]
        return scores.float()

    def chats(self, chats: Sequence[Sequence[Turn]]) -> list[Prediction]:
        """Answer chats, each a list of (role, content), as the assistant; an answer at the end is left out.

        Raises:
          ModelError: the model learned no chats, or its template refuses one of these.
        """
        if not self.answers_chats:
            raise ModelError("the model learned no chats; give it texts")
        return [self._reply(_asked(turns)) for turns in chats]

    @property
    def answers_chats(self) -> bool:
        """Tell whether the model learned chats."""
        return self.export.layout in ("lines", "template")

    def _reply(self, turns: Sequence[Turn]) -> Prediction:
        """Answer a chat written as in training, up to the mark behind an answer."""
        tokenizer = self._tokenizer()
        question = render_question(tokenizer, turns)
        templated = self.export.layout == "template"
        limit = (self.trainable.backbone.max_positions or _LONGEST) - _room(self.trainable)
        encoded = encode_answered(
            tokenizer,
            [question.text],
            [()],
            max_length=limit,
            special=not templated,
            quoted=[question.quoted] if templated else None,
        )
        tokens = self._without_end(encoded.tokens.tolist())
        if len(tokens) >= limit:
            raise ModelError(
                f"a chat leaves no room for an answer within the {limit} places of the model; shorten it"
            )
        words = self._decoded(
            self._grown(tokens, ends=end_of_answer(tokenizer, question.behind))[len(tokens) :]
        )
        if not templated:
            words = words.split("\nuser: ")[0]
        return Prediction(answer=words.strip())

    def prompt_tokens(self, text: str) -> list[int]:
        """Return the tokens a text is grown from; of a prompt, with what parts it from its answer."""
        return self._tokens(text + "\n" if self.export.layout == "answered" else text)

    def words_of(self, tokens: Sequence[int]) -> str:
        """Return the words of tokens up to the first that ends a text."""
        whole = list(tokens)
        if self.end_token in whole:
            whole = whole[: whole.index(self.end_token)]
        return self._decoded(whole).strip()

    @property
    def end_token(self) -> int:
        """Return the token that ends a text; -1 where the model has none."""
        end = self._tokenizer().eos_token_id
        return end if isinstance(end, int) else -1

    def room_behind(self, text: str) -> int:
        """Return how many tokens the model has positions for behind a prompt."""
        limit = self.trainable.backbone.max_positions or _LONGEST
        return limit - _room(self.trainable) - len(self.prompt_tokens(text))

    def _continue(self, text: str) -> Prediction:
        """Continue a text with the likeliest token, one at a time; of a prompt return the answer alone."""
        if self.export.layout == "answered":
            tokens = self._tokens(text + "\n")  # what parts a prompt from its answer in training
            return Prediction(answer=self._decoded(self._grown(tokens)[len(tokens) :]).strip())
        return Prediction(answer=self._decoded(self._grown(self._tokens(text))))

    def _grown(self, tokens: Sequence[int], *, ends: Collection[int] = ()) -> list[int]:
        """Return the tokens with the likeliest ones behind them, up to one that ends the answer."""
        stops = {self._tokenizer().eos_token_id, *ends}
        limit = self.trainable.backbone.max_positions or _LONGEST
        grown = list(tokens)
        while len(grown) - len(tokens) < NEW_TOKENS and len(grown) + _room(self.trainable) < limit:
            token = int(self._token_scores(grown)[-1].argmax())
            if token in stops:
                break
            grown.append(token)
        return grown

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer().decode(list(tokens), skip_special_tokens=True))

    def _write(self, text: str) -> Prediction:
        """Write the likeliest answer to a prompt, one token at a time."""
        tokenizer, backbone = self._tokenizer(), self.trainable.backbone
        prompt = encode_texts(tokenizer, [[text]], max_length=self.export.max_length, labels=None)
        ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
        answer = [start_token(backbone.source, backbone.config)]
        limit = min(NEW_TOKENS, backbone.max_positions or NEW_TOKENS)
        while len(answer) <= limit:
            with torch.inference_mode():
                scores: Tensor = self.trainable.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    decoder_input_ids=torch.tensor([answer]),
                ).logits
            token = int(scores[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
        return Prediction(answer=str(tokenizer.decode(answer[1:], skip_special_tokens=True)))

    def _restore(self, text: str) -> Prediction:
        """Replace every mask token by the likeliest one."""
        tokenizer = self._tokenizer()
        tokens = tokenizer(text, truncation=True, max_length=self.export.max_length)["input_ids"]
        places = []
        for place, token in enumerate(tokens):
            if token == tokenizer.mask_token_id:
                places.append(place)
        if not places:
            raise ModelError(f"a masked language model restores {tokenizer.mask_token}; the text holds none")
        best = self._token_scores(tokens).argmax(dim=-1)
        for place in places:
            tokens[place] = int(best[place])
        return Prediction(answer=str(tokenizer.decode(tokens, skip_special_tokens=True)))

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens a text is continued from; the token that ends a text is left out.

        Marks in a text are words, as in training; of a model for chats people write them themselves.
        """
        tokenizer, length = self._tokenizer(), self.export.max_length
        if has_template(tokenizer):
            tokens = list(tokenizer(text, truncation=True, max_length=length)["input_ids"])
        else:
            tokens = encode_texts(tokenizer, [[text]], max_length=length, labels=None).tokens.tolist()
        return self._without_end(tokens) or [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]

    def _without_end(self, tokens: list[int]) -> list[int]:
        if len(tokens) > 1 and tokens[-1] == self._tokenizer().eos_token_id:
            return tokens[:-1]
        return tokens

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; a model of texts has one."""
        tokenizer = self.trainable.backbone.tokenizer
        assert tokenizer is not None, "a model of texts has a tokenizer"
        return cast(PreTrainedTokenizerBase, tokenizer)


def _asked(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Leave out an answer that a chat ends with: it is what the model is asked for."""
    if turns and turns[-1][0] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise ModelError("a chat without a turn before the answer asks nothing; give one")
    return turns


def _room(trainable: TrainableModel) -> int:
    """Return how many positions virtual tokens take."""
    length = getattr(trainable.model, "length", 0)
    if isinstance(length, int):
        return int(length)
    return 0
