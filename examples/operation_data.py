"""Make training, validation and test records from the documentation that boto3 brings along.

One record is one operation of one AWS service: the prompt names the service and gives the first
sentence of the operation's description, the completion is `service:Operation`. Only operations
whose name can be found from that sentence are taken, because a name that is not there cannot be
answered by anyone. The result depends on the installed botocore alone, never on chance.

The three sets share nothing: no service, no operation name, no description that says nearly the
same. What is asked in the end was therefore never seen, and neither was anything like it.

    python examples/operation_data.py FOLDER
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import botocore.session

NUM_TRAINING, NUM_VALIDATION, NUM_TEST = 400, 50, 40
PER_SERVICE = {"training": 3, "validation": 2, "test": 2}
MAX_WORDS = 20
NEARLY_THE_SAME = 0.5
"""Share of content words that two descriptions may have in common, over those that either has."""
STOP_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        "a all amazon an and any are as aws be by can existing for from given has have in "
        "information into is it its new of on one operation or provided returns specified that "
        "the this to which with you your",
    )
)


@dataclass(frozen=True)
class Operation:
    """One operation as its service's model describes it."""

    service: str
    name: str
    sentence: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"Name the operation of {self.service} that does this.\n{self.sentence}"

    @property
    def completion(self) -> str:
        """What it should answer."""
        return f"{self.service}:{self.name}"


def main(folder: Path) -> None:
    """Write training.jsonl, validation.jsonl and test.jsonl below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, operations in split(read_operations()).items():
        lines = [
            json.dumps({"prompt": operation.prompt, "completion": operation.completion})
            for operation in operations
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_operations() -> list[Operation]:
    """Return the usable operations of every service, in an order that is shuffled but fixed."""
    loader = botocore.session.get_session().get_component("data_loader")
    found = []
    for service in loader.list_available_services("service-2"):
        operations = loader.load_service_model(service, "service-2")["operations"]
        for name, model in operations.items():
            sentence = first_sentence(plain_text(model.get("documentation", "")))
            if not model.get("deprecated") and can_be_answered(name, sentence):
                found.append(Operation(service, name, sentence))
    return sorted(found, key=lambda operation: shuffled(operation.completion))


def split(operations: list[Operation]) -> dict[str, list[Operation]]:
    """Choose the records of each set.

    A service belongs to one set. An operation is left out where a chosen one, of whatever set, has
    its name or nearly its description.
    """
    wanted = {"test": NUM_TEST, "validation": NUM_VALIDATION, "training": NUM_TRAINING}
    chosen: dict[str, list[Operation]] = {}
    names: set[str] = set()
    descriptions: list[frozenset[str]] = []
    for set_name, number in wanted.items():
        taken: list[Operation] = []
        per_service: dict[str, int] = {}
        for operation in operations:
            if len(taken) == number:
                break
            words = content_words(operation.sentence)
            if (
                set_of(operation.service) == set_name
                and per_service.get(operation.service, 0) < PER_SERVICE[set_name]
                and operation.name not in names
                and not any(overlap(words, other) >= NEARLY_THE_SAME for other in descriptions)
            ):
                taken.append(operation)
                per_service[operation.service] = per_service.get(operation.service, 0) + 1
                names.add(operation.name)
                descriptions.append(words)
        chosen[set_name] = taken
    return chosen


def set_of(service: str) -> str:
    """Return the one set that a service's operations may be in."""
    share = shuffled(service) / 2**64
    return "test" if share < 0.12 else "validation" if share < 0.24 else "training"


def can_be_answered(name: str, sentence: str) -> bool:
    """Tell whether every word of an operation's name stands in the sentence, in some form."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z][a-z0-9]+|[A-Z]+", name)
    if "".join(words) != name or not 2 <= len(words) <= 4:
        return False
    if not 4 <= len(sentence.split()) <= MAX_WORDS:
        return False
    present = {stem(word) for word in re.findall(r"[A-Za-z0-9]+", sentence)}
    return all(stem(word) in present for word in words)


def content_words(sentence: str) -> frozenset[str]:
    """Return what a sentence is about, without the words that most descriptions share."""
    words = {stem(word) for word in re.findall(r"[A-Za-z0-9]+", sentence)}
    return frozenset(words - STOP_WORDS)


def overlap(left: frozenset[str], right: frozenset[str]) -> float:
    """Return how much two sets of words have in common, from 0 to 1."""
    return len(left & right) / max(len(left | right), 1)


def stem(word: str) -> str:
    """Cut the endings that English puts on verbs and plurals."""
    word = word.lower()
    for ending, instead in (("ies", "y"), ("ches", "ch"), ("sses", "ss"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2 and not word.endswith("ss"):
            return word.removesuffix(ending) + instead
    return word


def plain_text(documentation: str) -> str:
    """Return a description without its HTML."""
    text = html.unescape(re.sub(r"<[^>]+>", " ", documentation))
    return re.sub(r" +([.,;:!?)])", r"\1", re.sub(r"\s+", " ", text)).strip()


def first_sentence(text: str) -> str:
    """Return the text up to its first full stop."""
    found = re.match(r".+?[.!?](?=\s|$)", text)
    return found.group() if found else text


def shuffled(text: str) -> int:
    """Return a number that orders texts as if by chance, and everywhere the same."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/operation_data.py FOLDER")
    main(Path(sys.argv[1]))
