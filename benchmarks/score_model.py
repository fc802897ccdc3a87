"""The loss and the greedy answers of a trained model, whoever trained it, by one and the same code.

    python -m benchmarks.score_model PAGE.json RESULT.json

The page names the base weights, the artifact (an adapter in peft's layout or a whole model; null
for the base), a file of rendered records, the number type, and optionally prompts to answer. A
process of its own, so that whoever compares models holds none of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.training_work import ROOT, read_examples

from outcrop.train.threads import ENVIRONMENT


@dataclass(frozen=True)
class Scoring:
    """What is to be scored."""

    weights: str
    artifact: str | None
    examples: str
    dtype: str | None = None
    """"float32", "bfloat16" or None for this machine's fastest."""
    prompts: Sequence[Sequence[int]] = ()
    end_token_ids: Sequence[int] = ()
    answer_tokens: int = 0
    threads: int = 2


def score(scoring: Scoring, folder: Path) -> dict[str, Any]:
    """Return {"loss": nats a token, "answers": lists of token ids}."""
    folder.mkdir(parents=True, exist_ok=True)
    page, answer = folder / "score.json", folder / "scored.json"
    page.write_text(json.dumps(asdict(scoring)), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.score_model", str(page), str(answer)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(scoring.threads)},
        check=True,
    )
    result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result


def main() -> None:
    """Read the page, score, and write the result."""
    import torch
    from benchmarks.greedy import greedy_answers

    from outcrop.evaluate.likelihood import evaluate_likelihood
    from outcrop.models.load import load_base
    from outcrop.models.lora import ADAPTER_CONFIG, load_adapter, set_adapter

    page = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(page["threads"])
    dtype = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}[page["dtype"]]
    folder = Path(page["artifact"] or page["weights"])
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    model = load_base(Path(page["weights"]) if is_adapter else folder, dtype)
    if is_adapter:
        set_adapter(model, load_adapter(folder))
    likelihood = evaluate_likelihood(model, read_examples(Path(page["examples"])))
    answers: list[list[int]] = []
    if page["prompts"]:
        answers = greedy_answers(
            model, page["prompts"], page["end_token_ids"], page["answer_tokens"]
        )
    result = {"loss": likelihood.loss, "num_tokens": likelihood.num_tokens, "answers": answers}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
