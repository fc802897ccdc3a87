"""Is the model that the published hyperparameters make visibly better than its base?

    python -m benchmarks.mts_dialog_rouge --weights FOLDER --data FOLDER --work FOLDER

Trains on all of mts-dialog-train with the example's settings (1 epoch, batch 8, learningRate
0.00001 of full fine-tuning, through the catalogue's factor), then asks three models for the note
of each test record, greedily: the base, the base with one worked example in its prompt, and the
custom model. Prints ROUGE-L and answer lengths as a Markdown table. Who answers is a function from
conversations to texts, so a running service can take the place of the models in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.greedy import greedy_answers
from benchmarks.learning_rate_study import example, read_rows

from outcrop.data.records import Message
from outcrop.data.render import Renderer
from outcrop.evaluate.generation import rouge_l, words
from outcrop.models.catalog import shipped_models
from outcrop.models.load import load_base
from outcrop.models.lora import load_adapter, set_adapter
from outcrop.train.loop import ARTIFACT, train
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import make_plan

BASE_MODEL = "cohere.command-light-text-v14"
HYPER_PARAMETERS = {"epochCount": "1", "batchSize": "8", "learningRate": "0.00001"}
VALIDATION = "mts-dialog-validation.jsonl"
ANSWER_TOKENS = 128

Conversation = tuple[Message, ...]
Answerer = Callable[[Sequence[Conversation]], list[str]]


def main() -> None:
    """Read the command line, train where there is no model yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()

    adapter = arguments.work / ARTIFACT
    if not adapter.is_dir():
        train_custom_model(arguments.weights, arguments.data, arguments.work, arguments.threads)
    rows = read_lines(arguments.data / f"mts-dialog-{arguments.split}.jsonl")[: arguments.records]
    worked = worked_example(read_lines(arguments.data / "mts-dialog-train.jsonl"))
    base = local_answerer(arguments.weights, None)
    custom = local_answerer(arguments.weights, adapter)
    plain = [(Message("user", row["prompt"]),) for row in rows]
    shown = [(Message("user", worked + row["prompt"]),) for row in rows]
    answers = {
        "base": base(plain),
        "base, one worked example in the prompt": base(shown),
        "custom": custom(plain),
    }
    wanted = [row["completion"] for row in rows]
    (arguments.work / f"answers-{arguments.split}.json").write_text(
        json.dumps(answers | {"wanted": wanted}, indent=1), encoding="utf-8"
    )
    print_table(answers, wanted)


def train_custom_model(weights: Path, data: Path, work: Path, threads: int) -> None:
    """Train with the published example's settings and say how it went."""
    base = next(model for model in shipped_models() if model.model_id == BASE_MODEL)
    plan = make_plan(base, "FINE_TUNING", HYPER_PARAMETERS, has_validation=True)
    renderer = Renderer(weights)
    training = [example(renderer, row) for row in read_lines(data / "mts-dialog-train.jsonl")]
    validation = [example(renderer, row) for row in read_rows(data / VALIDATION, 100)]
    started = time.perf_counter()

    def on_step(row: StepRow) -> None:
        if row.step_number % 10 == 0:
            seconds = time.perf_counter() - started
            print(
                f"step {row.step_number} loss {row.training_loss:.3f} {seconds:.0f} s", flush=True
            )

    def on_validation(row: ValidationRow) -> None:
        print(f"step {row.step_number} validation loss {row.validation_loss:.4f}")

    result = train(
        plan,
        weights,
        training,
        validation,
        work,
        on_step=on_step,
        on_validation=on_validation,
        threads=threads,
    )
    print(
        f"{result.steps} steps, {result.num_tokens} tokens, {result.seconds:.0f} s, "
        f"rate {plan.learning_rate:g}, digest {result.digest}"
    )


def local_answerer(weights: Path, adapter: Path | None) -> Answerer:
    """Return what asks a model in this process, greedily."""
    renderer = Renderer(weights)
    model = load_base(weights)
    if adapter is not None:
        set_adapter(model, load_adapter(adapter))

    def answer(conversations: Sequence[Conversation]) -> list[str]:
        prompts = [renderer.render_prompt(conversation) for conversation in conversations]
        found = greedy_answers(model, prompts, renderer.end_token_ids, ANSWER_TOKENS)
        return [renderer.decode(ids) for ids in found]

    return answer


def worked_example(rows: Sequence[dict[str, str]]) -> str:
    """Return the training record of median length, answered, as text before a prompt."""
    ordered = sorted(rows, key=lambda row: len(row["prompt"]))
    row = ordered[len(ordered) // 2]
    return f"{row['prompt']}{row['completion']}\n\n"


def print_table(answers: dict[str, list[str]], wanted: Sequence[str]) -> None:
    """Print ROUGE-L, its ratio to the base's, and the lengths."""
    length = statistics.median(len(words(text)) for text in wanted)
    base = statistics.mean(map(rouge_l, answers["base"], wanted))
    print(f"\n{len(wanted)} records; the references' median length is {length:g} words.\n")
    print("| model | ROUGE-L | times the base's | median words |")
    print("|---|---|---|---|")
    for name, texts in answers.items():
        score = statistics.mean(map(rouge_l, texts, wanted))
        median = statistics.median(len(words(text)) for text in texts)
        print(f"| {name} | {score:.3f} | {score / base:.2f} | {median:g} |")


def read_lines(file: Path) -> list[dict[str, str]]:
    """Return the records of a file in its order."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
