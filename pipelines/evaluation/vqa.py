"""Answers by a vision-language model through transformers. An image is encoded once for all its questions.

What a prompt says before the question, the image included, passes through the network once; its keys and values are
kept and every question is read behind them. In names of arrays Q is questions, T tokens, V the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor

from data_prep.scores.vlm import chat, generated, load
from infra.causes import first_line
from infra.errors import CheckpointError, EvaluationError
from pipelines.evaluation.answering import LONGEST, Answer, Unanswered, VlmAnswers
from pipelines.evaluation.judges import Image

WORDS = {True: ("yes", "Yes"), False: ("no", "No")}
_MARK = "Is it so?"  # stands for the question while the template is taken apart
_LONGEST_REPLY = 8  # tokens: more than a single word has


class VlmAnswerer:
    def __init__(self, settings: VlmAnswers, device: str) -> None:
        self.settings = settings
        self.processor, self.model = load(settings, device)
        self.tokenizer = self.processor.tokenizer
        self.before, mark, self.after = chat(self.processor, _MARK).partition(_MARK)
        parts = [*self._ids(self.before), *self._ids(f"{mark}{self.after}")]
        if not mark or parts != self._ids(f"{self.before}{mark}{self.after}"):
            raise CheckpointError(
                f"the chat template of {settings.model} does not put the image before the question",
                remedy="use Qwen2.5-VL or Qwen3-VL, or let a server answer: judge.kind=endpoint",
            )
        yes, no = ({self._ids(word)[0] for word in WORDS[which]} for which in (True, False))
        if yes & no:
            raise CheckpointError(
                f"the vocabulary of {settings.model} does not tell yes from no by the first token",
                remedy="use another model, or generated words: judge.answer=generated",
            )
        self.yes, self.no = sorted(yes), sorted(no)

    def answers(self, asked: Sequence[tuple[Image, Sequence[str]]]) -> list[list[Answer]]:
        return [self._about(image, texts) for image, texts in asked]

    def _about(self, image_HWC: Image, texts: Sequence[str]) -> list[Answer]:
        answer = self._likelier if self.settings.answer == "likelier" else self._generated
        try:
            return answer(Pillow.fromarray(image_HWC), [f"{text} {self.settings.instruction}" for text in texts])
        except torch.OutOfMemoryError as error:
            raise EvaluationError(
                f"the GPU has too little memory for the judge ({first_line(error)})",
                remedy="lower judge.batch or judge.max_pixels",
            ) from None
        except (ValueError, RuntimeError, AssertionError) as error:
            return [Unanswered(first_line(error))] * len(texts)

    def _likelier(self, image: Pillow.Image, texts: list[str]) -> list[Answer]:
        margins = self.margins(image, texts).tolist()
        return [Unanswered("NaN") if m != m else "yes" if m > 0 else "no" for m in margins]

    def _generated(self, image: Pillow.Image, texts: list[str]) -> list[Answer]:
        answers: list[Answer] = []
        for some in _batches(texts, self.settings.batch):
            prompts = [f"{self.before}{text}{self.after}" for text in some]
            replies = generated(self.processor, self.model, prompts, [image] * len(some), _LONGEST_REPLY)
            answers += [reply[:LONGEST] for reply in replies]
        return answers

    @torch.inference_mode()
    def margins(self, image: Pillow.Image, texts: Sequence[str]) -> Tensor:
        """By how much yes is likelier than no as the first word behind each text: the log of their ratio.

        A word counts by its first token, which for the published models is the whole word.
        """
        device = self.model.device
        begun = self.processor(text=[self.before], images=[image], return_tensors="pt").to(device)
        prefix = self.model.model(**begun, use_cache=True).past_key_values
        margins = []
        for some in _batches(texts, self.settings.batch):
            ids = [torch.tensor(self._ids(f"{text}{self.after}"), device=device) for text in some]
            # Pads stand behind the text, where attention, which looks back only, never sees them.
            ids_QT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(some))
            hidden = self.model.model(input_ids=ids_QT, past_key_values=cache, use_cache=True).last_hidden_state
            last = torch.tensor([len(row) - 1 for row in ids], device=device)
            margins.append(self.margin(hidden[torch.arange(len(some), device=device), last]))
        return torch.cat(margins)

    def margin(self, hidden: Tensor) -> Tensor:
        logits_QV: Tensor = self.model.get_output_embeddings()(hidden).float()
        return logits_QV[:, self.yes].logsumexp(-1) - logits_QV[:, self.no].logsumexp(-1)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _batches(texts: Sequence[str], size: int) -> Iterator[Sequence[Any]]:
    return (texts[first : first + size] for first in range(0, len(texts), size))
